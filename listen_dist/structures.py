"""The data types that cross module borders, and the legend of shapes.

Dimension letters used in docstrings and trailing comments everywhere:

    B   rows of a batch (clips)
    S   samples of audio (16 kHz, mono)
    F   encoder frames (50 a second)
    E   width of the encoder's frames
    A   audio tokens, what the projector gives the LLM
    P   text tokens
    T   length of the matched context: text before, audio, text after
    L   length of the LLM's input
    D   width of the LLM
    N   prompts in the pool
    k   prompts selected
    V   vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

SAMPLE_RATE = 16_000
"""Hz. All audio in shards and in the model is mono at this rate."""

ENCODER_RATE = 50
"""Encoder frames a second (Whisper: 10 ms mel hops, halved by the second convolution)."""


@dataclass(frozen=True)
class Record:
    """One line of a manifest: what is spoken where, and what the model should answer.

    `audio` holds one path, or two for `speaker_verification`. Either `target` is
    non-empty, or `references` is (several right answers; training takes the first), or
    `meta["no_speech"]` is true (`asr` of a clip in which nothing is said).
    """

    id: str
    audio: tuple[str, ...]
    task: str
    target: str = ""
    references: tuple[str, ...] = ()
    instruction: str = ""
    question: str = ""
    language: str = ""
    speaker: str = ""
    duration: float | None = None
    """Seconds of audio, if known before decoding."""
    split: str = ""
    meta: dict[str, object] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers; at least one in a valid record."""
        return self.references or (self.target,)


@dataclass(frozen=True)
class AudioSample:
    """A sample as read from a shard: the record, and its waveform and/or stored features."""

    record: Record
    waveform: np.ndarray | None
    """float32 [S], or None when the features were read instead."""
    features: np.ndarray | None = None
    """float16 [F, E] output of the frozen speech encoder, when the shard stores it."""
    audio_features: np.ndarray | None = None
    """float16 [F', E'] output of the frozen audio encoder, when the shard stores it too."""


@dataclass
class Batch:
    """A micro-batch, padded to its own longest row, with true lengths.

    `audio` holds either log-mel spectrograms [B, 80 or 128, M] (M mel frames, 100 a
    second) or, when `is_features`, stored encoder frames [B, F, E]. `fbank` is the audio
    encoder's input beside a log-mel: Kaldi filterbanks [B, M, 128] (100 frames a second).

    Every list but `skipped` and every tensor holds a row a clip: `select` and `pin_memory` go by that
    and so can't forget a field.
    """

    ids: list[str]
    tasks: list[str]
    audio: torch.Tensor
    audio_lengths: torch.Tensor  # [B] int64, true mel frames or encoder frames
    is_features: bool
    after_ids: list[list[int]]  # instruction tokens, a row each (unpadded)
    target_ids: list[list[int]]  # target and EOS, a row each; empty lists at inference
    answers: list[tuple[str, ...]]
    languages: list[str]
    """What the record says; empty where it says nothing."""
    seconds: list[float]
    choices: list[tuple[str, ...]]
    """The closed set of answers of each row, empty where there is none, as in training."""
    choice_ids: list[list[list[int]]]
    """Its tokens, EOS included: a row, a choice, a token."""
    skipped: list[SkippedSample] = field(default_factory=list)
    fbank: torch.Tensor | None = None
    fbank_lengths: torch.Tensor | None = None  # [B] int64, true filterbank frames
    retries: dict[str, int] = field(default_factory=dict)
    """How often the loader process tried a network source again since its last batch, by host."""

    @property
    def target_tokens(self) -> int:
        """Number of tokens the loss covers (target and EOS)."""
        return sum(len(row) for row in self.target_ids)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """The same batch with page-locked tensors; torch's DataLoader calls it."""
        return self._each(torch.Tensor.pin_memory, list)

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, without what was skipped and tried again."""
        return replace(self._each(lambda tensor: tensor[rows], lambda column: [column[row] for row in rows]),
                       skipped=[], retries={})

    def _each(self, of_tensor: Callable[[torch.Tensor], torch.Tensor], of_list: Callable[[list[Any]], list[Any]],
              ) -> Batch:
        """The batch with one function applied to every tensor, another to every list of rows."""
        changed: dict[str, Any] = {}
        for name, value in ((item.name, getattr(self, item.name)) for item in fields(self) if item.name != "skipped"):
            if isinstance(value, torch.Tensor):
                changed[name] = of_tensor(value)
            elif isinstance(value, list):
                changed[name] = of_list(value)
        return replace(self, **changed)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used: where it is and why."""

    id: str
    shard: str
    reason: str
    task: str = ""


@dataclass
class ModelOutput:
    """What `Listen.forward` returns for one micro-batch."""

    row_loss: torch.Tensor
    """float32 [B]: cross-entropy summed (not averaged) over each row's target tokens and EOS."""
    match_loss_sum: torch.Tensor
    """Scalar: match loss summed over rows; 0 where the selection has none."""
    target_tokens: int
    rows: int
    input_tokens: int
    """Real tokens of the LLM's input."""
    padded_tokens: int
    """The same with padding."""
    prompt_indices: torch.Tensor
    """int64 [B, k], best first where clips choose (`similarity`), else in the pool's order."""
    prompt_scores: torch.Tensor
    """float32 [B, k], softmax over the pool at the selected prompts."""
    observed: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """Sums for the pool's running statistics, float32; empty where it keeps none (see `Pool.observe`)."""

    @property
    def token_loss_sum(self) -> torch.Tensor:
        """Scalar: the same over all rows."""
        return self.row_loss.sum()


@dataclass(frozen=True)
class TextFrame:
    """The token ids around the audio that are the same for every clip."""

    bos: tuple[int, ...]
    """BOS, or empty where the LLM has none. Not part of the query."""
    before: tuple[int, ...]
    """The text before the audio."""
    eos: int
    pad: int


@dataclass(frozen=True)
class LoaderState:
    """All that resuming the data order needs: a cursor into a plan.

    The plan is a pure function of the shard indexes and the seed, whatever the number of
    ranks and workers, so nothing else is kept.
    """

    window: int = 0
    """The window of samples that the next micro-batch comes from."""
    offset: int = 0
    """Micro-batches of that window already used, by all ranks together."""
    samples: int = 0
    """Samples planned so far, by all ranks together, unusable ones included."""
