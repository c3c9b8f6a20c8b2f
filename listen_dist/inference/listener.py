"""`Listener`: a trained checkpoint that answers about audio.

    from listen_dist import Listener

    listener = Listener.from_checkpoint("runs/quickstart")
    print(listener.transcribe("a.flac"))
    for answer in listener.generate(["a.flac", "b.mp3"], task="caption"):
        print(answer.text, answer.parts[0].prompts)
    for text in listener.stream("a.flac", instruction="Who is speaking?"):
        print(text, end="", flush=True)

Audio is a path, the bytes of a file, or float samples [S] at 16 kHz; of any format, rate and number of channels that
soundfile or PyAV read. A Listener may be used from several threads: one lock guards the model.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from listen_dist import config as configuration
from listen_dist.data.collate import Prepared, collate
from listen_dist.data.decode import MIN_SECONDS, AudioError, as_stored, join_utterances, read_audio
from listen_dist.data.features import Fbank
from listen_dist.data.schedule import cut_by_budget
from listen_dist.engine import checkpoint, exports
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.errors import ListenError
from listen_dist.evaluation.decoding import Decoder
from listen_dist.evaluation.predictions import Prediction
from listen_dist.inference.long_audio import Piece, join, join_settled, split
from listen_dist.models.encoders import looks_local
from listen_dist.schema import Config
from listen_dist.structures import ENCODER_RATE, SAMPLE_RATE, Record
from listen_dist.tasks import get_task

logger = logging.getLogger(__name__)

Audio: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray
Clip: TypeAlias = Audio | tuple[Audio, Audio]
"""What one question is about; two recordings for `speaker_verification`."""

LONGEST_RECORDING = 4 * 3600.0
"""Seconds; bounds the memory that one file can take."""
SILENT = 1e-4
"""A clip whose loudest sample is below it (-80 dB) holds nothing to hear."""
DEMO_MODELS = "assets/models"
"""Where `tools/get_demo_models.py` puts the frozen models."""
CHUNK_CLIPS, CHUNK_SECONDS = 64, 600.0
"""So much is decoded ahead and put into batches by length."""


@dataclass(frozen=True)
class Ask:
    """What to ask about each clip."""

    task: str = "asr"
    instruction: str = ""
    """A question of one's own; empty: the task's."""
    choices: tuple[str, ...] = ()
    """The answers to choose from by likelihood; empty: the task's own set, or a generated text."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens of the LLM; default: what the task and the clip's length allow."""

    @property
    def record(self) -> Record:
        """The question as a record of a manifest would ask it."""
        return Record("", (), self.task, instruction=self.instruction)

    @property
    def all_choices(self) -> tuple[str, ...]:
        return self.choices or ((), get_task(self.task).choices)[not self.instruction]


@dataclass(frozen=True)
class Part:
    """The answer for one stretch of a recording that fits the encoder's window."""

    start: float
    """Seconds."""
    end: float
    text: str
    prompts: tuple[int, ...]
    """Numbers of the prompts put in front, best first."""
    scores: tuple[float, ...]
    """Of each: softmax over the pool."""
    choices: tuple[str, ...] = ()
    likelihoods: tuple[float, ...] = ()
    """log p(choice and EOS | input) of each choice."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one clip."""

    text: str
    seconds: float
    """Length of the audio."""
    parts: tuple[Part, ...]
    """One, or several for a recording longer than the encoder's window (silent ones left out)."""


@dataclass(frozen=True)
class _Heard:
    """A decoded clip: its pieces, each ready for a batch, or None where it is silent."""

    seconds: float
    pieces: list[Piece]
    rows: list[Prepared | None]


class Listener:
    """A trained model in eval mode. Build it with `from_checkpoint`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        """The loaded model, tokenizer and features; not guarded by the lock."""
        self._decoder = Decoder(parts, parts.config.eval, parts.config.pool.k, whole=True)
        self._fbank = Fbank() if parts.config.model.audio_encoder else None
        self._lock = threading.Lock()
        self.window = min(parts.config.data.max_seconds, parts.model.encoder.max_frames / ENCODER_RATE)
        """Longest clip, in seconds, that is heard in one piece."""

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, device: str = "auto",
                        dtype: Literal["bfloat16", "float32"] | None = None, top_k: int | None = None,
                        llm: str | None = None, speech_encoder: str | None = None,
                        audio_encoder: str | None = None) -> Listener:
        """Load a checkpoint and the frozen models that it was trained on.

        Args:
            path: an export, a checkpoint, or a run folder (its newest checkpoint).
            device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1` …
            dtype: of the frozen weights; default: as trained.
            top_k: prompts to pick; default: as trained.
            llm, speech_encoder, audio_encoder: where the frozen models lie here; default: where they lay in training,
                else under the same name in assets/models.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or one of another model.
            FileNotFoundError: a frozen model is not where the configuration says.
            ConfigError: `top_k` is not within the pool, or a frozen model is another one than in training.
        """
        folder = exports.resolve(Path(path))
        target = _device(device)
        config = _for_one_process(configuration.load(folder / "config.yaml"), target, dtype, top_k)
        model = replace(config.model, llm=llm or _here(config.model.llm),
                        speech_encoder=speech_encoder or _here(config.model.speech_encoder),
                        audio_encoder=audio_encoder or _here(config.model.audio_encoder))
        config = replace(config, model=model)
        try:
            exports.check_frozen(folder, config)
            parts = assemble(config, target)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: needs a frozen model that is not here: {error}; say where it lies with "
                                    "llm=, speech_encoder= or audio_encoder= (in the shell --llm …)") from error
        checkpoint.load_trainables(folder, parts.model.trainable)
        parts.model.eval()
        return cls(parts)

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self.parts.config

    def transcribe(self, audio: Audio) -> str:
        """What is said in a recording of any length (up to four hours).

        Raises:
            AudioError: not readable, empty or silent.
        """
        return self.generate([audio])[0].text

    def generate(self, clips: Sequence[Clip], task: str = "asr", instruction: str = "", choices: Sequence[str] = (),
                 max_new_tokens: int | None = None, batch_tokens: int = 2048) -> list[Answer]:
        """Answers about several clips, in their order; batches are formed by length.

        Args:
            task: see `listen_dist.tasks`; decides the default question and how long an answer may be.
            instruction: a question of one's own.
            choices: answers to choose from by likelihood, instead of generating.
            max_new_tokens: longest answer, in tokens of the LLM.
            batch_tokens: LLM input tokens of one batch, padding included.

        Raises:
            AudioError: of the first clip that can't be used.
            ListenError: unknown task, or one that needs an `instruction`.
        """
        answers: dict[int, Answer] = {}
        for number, result in self.listen(clips, Ask(task, instruction, tuple(choices), max_new_tokens), batch_tokens):
            if isinstance(result, AudioError):
                raise result
            answers[number] = result
        return [answers[number] for number in sorted(answers)]

    def listen(self, clips: Iterable[Clip], ask: Ask, batch_tokens: int = 2048,
               ) -> Iterator[tuple[int, Answer | AudioError]]:
        """Each clip's number and its answer, or why there is none, as soon as it is known; not in order."""
        for chunk in _chunks(self._hear_all(clips, ask)):
            heard = {number: clip for number, clip in chunk if isinstance(clip, _Heard)}
            yield from ((number, clip) for number, clip in chunk if isinstance(clip, AudioError))
            yield from self._answer_all(heard, ask, batch_tokens)

    def stream(self, audio: Clip, task: str = "asr", instruction: str = "", choices: Sequence[str] = (),
               max_new_tokens: int | None = None) -> Generator[str, None, Answer]:
        """The answer about one clip as it is generated, in stretches of text; returns the whole Answer.

        A recording longer than the window comes piece by piece; choices and beams give all text at once. Leaving the
        generator ends the generation.

        Raises:
            ListenError: as `generate`.
        """
        ask = Ask(task, instruction, tuple(choices), max_new_tokens)
        heard = self._hear(audio, ask)
        if len(heard.rows) > 1:
            return (yield from self._stream_pieces(heard, ask))
        if not ask.all_choices and self.config.eval.beams == 1:
            return (yield from self._stream(heard, ask))
        ((_, answer),) = self._answer_all({0: heard}, ask, self.config.eval.batch_tokens)
        yield answer.text
        return answer

    def _stream(self, heard: _Heard, ask: Ask) -> Generator[str, None, Answer]:
        tokens = _TokenQueue()
        results: list[list[Prediction] | BaseException] = []

        def work() -> None:
            try:
                results.append(self._answer_rows(heard.rows, ask, streamer=tokens,
                                                 stopping_criteria=StoppingCriteriaList([tokens.abandoned])))
            except BaseException as error:  # raised again below, in the caller's thread
                results.append(error)
            finally:
                tokens.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        ids: list[int] = []
        sent = ""
        try:
            for token in tokens:
                ids += [token] if token != self.parts.text.frame.eos else []
                text = self.parts.text.decode(ids)
                # Half a character of several bytes comes out as a mark that the next token replaces.
                if text.startswith(sent) and not text.endswith("\ufffd") and text != sent:
                    yield text[len(sent):]
                    sent = text
        finally:
            tokens.abandoned.now = True
            thread.join()
        if isinstance(results[0], BaseException):
            raise results[0]
        answer = _answer(heard, list(results[0]))
        if answer.text[len(sent):]:
            yield answer.text[len(sent):]
        return answer

    def _stream_pieces(self, heard: _Heard, ask: Ask) -> Generator[str, None, Answer]:
        """Pieces in their order, some at a time; of the text what no later piece can change."""
        places = [i for i, row in enumerate(heard.rows) if row is not None]
        overlaps = [piece.overlap for piece in heard.pieces]
        done: list[Prediction | None] = [None] * len(heard.rows)
        sent = ""
        for batch in cut_by_budget(self._costs([heard.rows[i] for i in places]), range(len(places)),
                                   self.config.eval.batch_tokens):
            now = [places[at] for at in batch]
            for i, prediction in zip(now, self._answer_rows([heard.rows[i] for i in now], ask), strict=True):
                done[i] = prediction
            until = now[-1] + 1
            text = join_settled(["" if p is None else p.text for p in done[:until]], overlaps[: until + 1])
            if text[len(sent):]:
                yield text[len(sent):]
                sent = text
        answer = _answer(heard, done)
        if answer.text[len(sent):]:
            yield answer.text[len(sent):]
        return answer

    def _hear_all(self, clips: Iterable[Clip], ask: Ask) -> Iterator[tuple[int, _Heard | AudioError]]:
        for number, clip in enumerate(clips):
            try:
                yield number, self._hear(clip, ask)
            except AudioError as error:
                yield number, error

    def _hear(self, clip: Clip, ask: Ask) -> _Heard:
        """Decode, cut and prepare one clip."""
        is_long = ask.task == "asr"
        wave = _decode(clip, LONGEST_RECORDING if is_long else self.window)
        if np.abs(wave).max() < SILENT:
            raise AudioError(f"{_name(clip)}silent: no sample is above {SILENT:g} of full scale")
        pieces = split(wave, self.window)
        stretches = [wave[piece.start : piece.end] for piece in pieces]
        rows = [self.prepare(part, ask) if np.abs(part).max() >= SILENT else None for part in stretches]
        return _Heard(len(wave) / SAMPLE_RATE, pieces, rows)

    def prepare(self, wave: np.ndarray, ask: Ask) -> Prepared:
        """One row of a batch from float32 [S] at 16 kHz within the window."""
        with self._lock:  # the encoder of texts keeps what it has seen
            after = self.parts.text.after_ids(ask.record)
            ids = tuple(self.parts.text.target_ids(choice) for choice in ask.all_choices)
        return Prepared(ask.record, self.parts.log_mel(wave), after, [], len(wave) / SAMPLE_RATE, ask.all_choices, ids,
                        self._fbank(wave) if self._fbank else None)

    def _answer_all(self, heard: dict[int, _Heard], ask: Ask, budget: int) -> Iterator[tuple[int, Answer]]:
        """Answer clips in batches of pieces of like length; each clip as soon as its last piece is done."""
        places = [(number, i) for number, clip in heard.items() for i, row in enumerate(clip.rows) if row is not None]
        rows = [row for clip in heard.values() for row in clip.rows if row is not None]
        costs = self._costs(rows)
        done: dict[int, dict[int, Prediction]] = {number: {} for number in heard}
        for batch in cut_by_budget(costs, np.argsort(costs, kind="stable").tolist(), budget):
            for at, prediction in zip(batch, self._answer_rows([rows[at] for at in batch], ask), strict=True):
                number, i = places[at]
                done[number][i] = prediction
                if len(done[number]) == sum(row is not None for row in heard[number].rows):
                    yield number, _answer(heard[number], [done[number].get(n) for n in range(len(heard[number].rows))])

    def _costs(self, rows: Sequence[Prepared | None]) -> np.ndarray:
        """Tokens of the LLM's input for each row."""
        cost = self.parts.token_cost(self._decoder.k)
        return np.array([cost.fixed + math.ceil(row.seconds * cost.audio_tokens_per_second) + len(row.after_ids)
                         for row in rows if row is not None])

    def _answer_rows(self, rows: Sequence[Prepared | None], ask: Ask, **options: object) -> list[Prediction]:
        batch = collate([row for row in rows if row is not None], is_features=False, skipped=[])
        with self._lock, torch.inference_mode():
            if ask.all_choices:
                return self._decoder.choose(batch)
            return self._decoder.generate(batch, ask.max_new_tokens, **options)


class _Abandoned(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """input_ids [B, so far] → bool [B]."""
        return torch.full((len(input_ids),), self.now, device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Hands the tokens of a generation of one row over to another thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.abandoned = _Abandoned()

    def put(self, value: torch.Tensor) -> None:
        """value: ids of any shape; empty for an input of embeddings."""
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)


def _answer(heard: _Heard, predictions: Sequence[Prediction | None]) -> Answer:
    parts = tuple(Part(piece.start / SAMPLE_RATE, piece.end / SAMPLE_RATE, p.text, p.prompts, p.scores, p.choices,
                       p.likelihoods)
                  for piece, p in zip(heard.pieces, predictions, strict=True) if p is not None)
    if len(heard.pieces) == 1:
        return Answer(parts[0].text, heard.seconds, parts)
    texts = ["" if p is None else p.text for p in predictions]
    return Answer(join(texts, [piece.overlap for piece in heard.pieces]), heard.seconds, parts)


def _chunks(heard: Iterable[tuple[int, _Heard | AudioError]]) -> Iterator[list[tuple[int, _Heard | AudioError]]]:
    """Runs of at most CHUNK_CLIPS clips, closed by the one that reaches CHUNK_SECONDS."""
    chunk: list[tuple[int, _Heard | AudioError]] = []
    seconds = 0.0
    for number, clip in heard:
        chunk.append((number, clip))
        seconds += clip.seconds if isinstance(clip, _Heard) else 0
        if len(chunk) >= CHUNK_CLIPS or seconds >= CHUNK_SECONDS:
            yield chunk
            chunk, seconds = [], 0.0
    if chunk:
        yield chunk


def _decode(clip: Clip, max_seconds: float) -> np.ndarray:
    """float32 [S] at 16 kHz; two recordings are joined with a short silence."""
    if isinstance(clip, tuple):
        wave = join_utterances(*(_decode(one, max_seconds) for one in clip))
        if len(wave) > max_seconds * SAMPLE_RATE:
            raise AudioError(f"{_name(clip)}together longer than the limit of {max_seconds:g} s")
        return wave
    if not isinstance(clip, np.ndarray):
        sound = read_audio(clip, max_seconds)
        for remark in sound.remarks:
            logger.warning("%s%s", _name(clip), remark)
        return sound.samples
    if clip.ndim != 1 or clip.dtype.kind != "f" or not np.isfinite(clip).all():
        raise AudioError(f"samples {clip.dtype} {list(clip.shape)}: must be finite floats [S], mono at 16 kHz")
    if not MIN_SECONDS <= len(clip) / SAMPLE_RATE <= max_seconds:
        raise AudioError(f"{len(clip) / SAMPLE_RATE:.3f} s long; must be {MIN_SECONDS} … {max_seconds:g} s")
    if np.abs(clip).max() > 2:
        raise AudioError(f"samples up to {np.abs(clip).max():.4g}: full scale is 1, so divide them")
    return as_stored(clip)


def _name(clip: Clip) -> str:
    """What a message about a clip begins with."""
    if isinstance(clip, tuple):
        return " and ".join(filter(None, (_name(one).removesuffix(": ") for one in clip))) + ": "
    return "" if isinstance(clip, (bytes, np.ndarray)) else f"{os.fspath(clip)}: "


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ListenError(f"device = {name!r}: no usable NVIDIA GPU here; take 'cpu'")
    return torch.device(name)


def _here(path: str) -> str:
    """Where a frozen model lies on this machine: where it lay in training, or by its name among the demo models."""
    if path and looks_local(path) and not os.path.exists(path):
        for root in (Path(), Path(__file__).resolve().parents[2]):
            if (root / DEMO_MODELS / Path(path).name).exists():
                return str(root / DEMO_MODELS / Path(path).name)
    return path


def _for_one_process(config: Config, device: torch.device, dtype: Literal["bfloat16", "float32"] | None,
                     top_k: int | None) -> Config:
    """The configuration of a training run, for use without other ranks."""
    on_cpu = device.type == "cpu" and config.model.attention == "flash_attention_2"
    changed = replace(
        config,
        model=replace(config.model, dtype=dtype or config.model.dtype,
                      attention="sdpa" if on_cpu else config.model.attention),
        projector=replace(config.projector, init_from=None, freeze=False),
        pool=config.pool if top_k is None else replace(config.pool, top_k=top_k),
        parallel=replace(config.parallel, llm="replicated"))
    configuration.check(changed)
    return changed
