"""Listening with a checkpoint: Python, shell, threads, streams, bad input."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from listen_dist import Listener, infer
from listen_dist.data.decode import AudioError
from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import assemble
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.errors import ListenError
from listen_dist.inference.listener import Ask
from listen_dist.models.listen import Listen
from listen_dist.schema import ConfigError
from listen_dist.structures import SAMPLE_RATE, Batch
from tests import launching, tiny
from tools import bench_infer

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def run(untrained: Path) -> Path:
    return untrained


@pytest.fixture(scope="module")
def listener(run: Path) -> Listener:
    return Listener.from_checkpoint(run, device="cpu")


WAVES = [tiny.sound(seconds, seed) for seed, seconds in enumerate((1.7, 0.4, 3.1, 0.9, 2.2))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files."""
    folder = tmp_path_factory.mktemp("audio")
    for i, wave in enumerate(WAVES):
        soundfile.write(folder / f"good-{i}.flac", wave, SAMPLE_RATE)
    soundfile.write(folder / "silent.wav", np.zeros(8000), SAMPLE_RATE)
    soundfile.write(folder / "long.wav", np.tile(tiny.sound(4, 9), 9), SAMPLE_RATE)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio " * 50)
    (folder / "cut.flac").write_bytes((folder / "good-2.flac").read_bytes()[:100])
    return folder


def test_one_by_one_equals_batched_and_says_which_prompts(listener: Listener) -> None:
    together = listener.generate(WAVES, "caption")
    assert len({answer.text for answer in together}) == len(WAVES)  # else this could not tell rows apart
    for wave, answer in zip(WAVES, together, strict=True):
        (alone,) = listener.generate([wave], "caption")
        assert alone.text == answer.text and alone.parts[0].prompts == answer.parts[0].prompts
        assert answer.seconds == len(wave) / SAMPLE_RATE and len(answer.parts[0].prompts) == 4
        assert list(answer.parts[0].scores) == sorted(answer.parts[0].scores, reverse=True)


def test_weights_come_from_the_checkpoint(listener: Listener, run: Path, tiny_world: tiny.Tiny) -> None:
    untrained = Listener(assemble(tiny_world.config("parallel.llm=replicated"), torch.device("cpu")))
    assert untrained.transcribe(WAVES[2]) != listener.transcribe(WAVES[2])
    fewer = Listener.from_checkpoint(run, device="cpu", top_k=1, dtype="bfloat16")
    assert len(fewer.generate([WAVES[0]])[0].parts[0].prompts) == 1
    assert next(fewer.parts.model.llm.parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"pool\.top_k = 11"):
        Listener.from_checkpoint(run, top_k=11)


def test_formats_rates_and_channels_are_heard_alike(listener: Listener, folder: Path) -> None:
    text = listener.transcribe(WAVES[0])
    exact = (WAVES[0] * 32767).round() / 32768
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([exact, exact], 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    assert listener.transcribe(folder / "good-0.flac") == text == listener.transcribe(stereo.getvalue())
    m4a = folder / "other.m4a"  # soundfile can't read it
    with av.open(str(m4a), "w") as container:
        stream = container.add_stream("alac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((WAVES[0][None] * 32768).astype(np.int16), format="s16p", layout="mono")
        frame.rate = SAMPLE_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert abs(listener.generate([m4a])[0].seconds - 1.7) < 0.3
    m4a.unlink()


def test_a_stream_adds_up_and_can_be_left(listener: Listener) -> None:
    pieces = []
    for wave in WAVES:
        stretches = list(listener.stream(wave, max_new_tokens=30))
        assert "".join(stretches) == listener.generate([wave], max_new_tokens=30)[0].text
        pieces.append(len(stretches))
    assert max(pieces) > 3  # a random model may end an answer soon
    threads = threading.active_count()
    stream = listener.stream(WAVES[0], max_new_tokens=900)
    next(stream)
    stream.close()
    assert threading.active_count() == threads  # no generation goes on behind
    with pytest.raises(ListenError, match="unknown task"):
        next(listener.stream(WAVES[0], task="asrr"))


def test_several_threads_get_what_one_gets(listener: Listener) -> None:
    alone = [listener.generate([wave], task)[0].text for task in ("asr", "caption") for wave in WAVES]
    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(listener.generate, [wave], task) for task in ("asr", "caption") for wave in WAVES]
        streams = [threads.submit(lambda wave=wave: "".join(listener.stream(wave))) for wave in WAVES]
        assert [job.result()[0].text for job in jobs] == alone
        assert [job.result() for job in streams] == alone[: len(WAVES)]


def test_choices_and_pairs(listener: Listener) -> None:
    (answer,) = listener.generate([WAVES[0]], instruction="Which?", task="language_id", choices=("french", "russian"))
    likelihoods = answer.parts[0].likelihoods
    assert answer.text == ("french", "russian")[int(np.argmax(likelihoods))]
    (pair,) = listener.generate([(WAVES[0], WAVES[1])], "speaker_verification")
    assert pair.text in ("yes", "no") and pair.seconds == pytest.approx(1.7 + 0.1 + 0.4)


def test_a_long_recording_is_cut_for_asr_alone(listener: Listener, folder: Path) -> None:
    (answer,) = listener.generate([folder / "long.wav"])
    assert answer.seconds == 36 and len(answer.parts) == 2
    assert answer.parts[0].start == 0 and answer.parts[1].end == 36 and answer.parts[0].end >= answer.parts[1].start
    assert "".join(listener.stream(folder / "long.wav")) == answer.text
    with pytest.raises(AudioError, match=r"long\.wav: 36\.0 s long .*limit is 30 s"):
        listener.generate([folder / "long.wav"], "caption")


@pytest.mark.parametrize("samples, said", [
    (np.zeros(8000, np.float32), "silent"), (np.ones(100, np.float32), "0.006 s"),
    (np.full(8000, np.nan, np.float32), "finite"),
    (np.ones(8000, np.float32) * 9000, "full scale is 1"), (np.ones((2, 8000), np.float32), "mono"),
])
def test_unusable_samples_are_refused(listener: Listener, samples: np.ndarray, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        listener.transcribe(samples)


# --- the shell ------------------------------------------------------------------------------------


@dataclass
class Shell:
    code: int
    out: str
    err: str


@pytest.fixture
def shell(run: Path, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The program in this process, on the run's checkpoint."""
    def program(*words: str | Path) -> Shell:
        capfd.readouterr()
        try:
            code = infer.main([str(word) for word in words] + ["--device", "cpu"])
        except SystemExit as end:
            code = int(end.code or 0)
        return Shell(code, *capfd.readouterr())

    return program


def test_a_folder_with_bad_files(shell, run: Path, folder: Path, listener: Listener) -> None:  # type: ignore[no-untyped-def]
    done = shell(folder, folder / "no-such.wav", "--checkpoint", run, "--task", "caption")
    assert done.code == 1
    expected = [f"{folder / f'good-{i}.flac'}\t{' '.join(listener.generate([wave], 'caption')[0].text.split())}"
                for i, wave in enumerate(WAVES)]
    assert done.out.splitlines() == expected
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for name, reason in (("cut.flac", ""), ("empty.wav", "empty file"), ("silent.wav", "silent"), ("long.wav", "limit"),
                         ("text.wav", "can't be decoded"), ("no-such.wav", "no such file")):
        (line,) = [line for line in errors if f"{folder / name}: " in line]
        assert reason in line
    assert len(errors) == 6


def test_names_and_what_is_left_out(shell, run: Path, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Line ends and tabs in names, a Mac's notes, formats that soundfile or FFmpeg alone know."""
    good = folder / "good-1.flac"
    for name in ("a\tb\nc.flac", "._good.flac", "notes.txt"):
        (tmp_path / name).write_bytes(good.read_bytes())
    wave, rate = soundfile.read(good)
    soundfile.write(tmp_path / "d.sph", wave, rate, format="NIST")
    soundfile.write(tmp_path / "e.caf", wave, rate)
    soundfile.write(tmp_path / "f.wav", wave[::2], rate // 2, subtype="GSM610")
    done = shell(tmp_path, "--checkpoint", run, "--task", "caption")
    assert done.code == 0, done.err
    names = [line.split("\t")[0] for line in done.out.splitlines()]
    assert names == [f"{tmp_path}/{name}" for name in ("a\\tb\\nc.flac", "d.sph", "e.caf", "f.wav")]
    assert f"{tmp_path}: 4 audio files; 2 others are left out by their names, for instance {tmp_path}/._" in done.err


def test_json_lines_hold_everything(shell, run: Path, folder: Path) -> None:  # type: ignore[no-untyped-def]
    done = shell(folder / "good-1.flac", folder / "text.wav", "--checkpoint", run / "checkpoints", "--jsonl",
                 "--explain", "--top-k", "2")
    first, second = (json.loads(line) for line in done.out.splitlines())
    assert done.code == 1 and first["file"].endswith("good-1.flac") and first["seconds"] == 0.4
    assert len(first["parts"][0]["prompts"]) == len(first["parts"][0]["scores"]) == 2
    assert "text.wav" in second["error"]


def test_a_pipe_is_read_and_an_address_is_named(shell, run: Path, folder: Path, listener: Listener) -> None:  # type: ignore[no-untyped-def]
    reading, writing = os.pipe()
    os.write(writing, (folder / "good-1.flac").read_bytes())
    os.close(writing)
    done = shell(f"/dev/fd/{reading}", "https://host/a.wav", "--checkpoint", run)
    os.close(reading)
    assert done.code == 1 and done.out == f"/dev/fd/{reading}\t{' '.join(listener.transcribe(WAVES[1]).split())}\n"
    assert "error: https://host/a.wav: an address, not a file; download it first" in done.err


@pytest.mark.parametrize("words, said", [
    (["--task", "asrr"], "did you mean 'asr'"), (["--task", "speech_qa"], "needs a question"),
    (["--choices", "yes"], "two or more"), (["--checkpoint", "/nowhere"], "/nowhere: no checkpoint here"),
    (["--llm", "/nowhere"], "'/nowhere': no such folder"), (["--top-k", "0"], "pool.top_k = 0"),
    (["--task", "speaker_verification"], "two recordings"), (["--device", "cuda:0"], "no usable NVIDIA GPU"),
])
def test_wrong_usage_is_named(shell, run: Path, folder: Path, words: list[str], said: str) -> None:  # type: ignore[no-untyped-def]
    if "--device" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "--device" in words:
        code, errors = infer.main([str(folder / "good-0.flac"), "--checkpoint", str(run), *words]), said
    else:
        done = shell(folder / "good-0.flac", *([] if "--checkpoint" in words else ["--checkpoint", run]), *words)
        code, errors = done.code, done.err
        assert not done.out
    assert code == 2 and said in errors


def test_a_damaged_checkpoint_is_refused(shell, run: Path, folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "step-000003"
    broken.mkdir()
    for file in checkpoint.resolve(run).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "trainables.safetensors").write_bytes(b"x" * 100)
    done = shell(folder / "good-0.flac", "--checkpoint", broken)
    assert done.code == 2 and "trainables.safetensors: missing or damaged" in done.err
    with pytest.raises(CheckpointError):
        Listener.from_checkpoint(broken)


def test_ctrl_c_keeps_what_is_done(run: Path, folder: Path, listener: Listener) -> None:
    """Stdin is read when its turn comes: the program stands there with one answer given when it is interrupted."""
    words = [sys.executable, "-m", "listen_dist.infer", *[str(folder / "good-0.flac")] * 64, "-", "--checkpoint",
             str(run), "--device", "cpu"]
    program = subprocess.Popen(words, cwd=launching.ROOT, env=launching.environment(), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line == f"{folder / 'good-0.flac'}\t{' '.join(listener.transcribe(WAVES[0]).split())}\n"
    for _ in range(63):
        assert program.stdout.readline() == line
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=120)
    assert program.returncode == 130 and err.endswith("interrupted\n") and not out, (program.returncode, out, err)


def test_done_answers_behind_a_gap_are_printed_at_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    from listen_dist.inference.listener import Answer
    from listen_dist.inference.shell import Form, write

    def results():  # type: ignore[no-untyped-def]
        yield 2, Answer("third", 1, ())
        yield 0, Answer("first", 1, ())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(["a", "b", "c"], results(), Form(False, False, False))
    assert capsys.readouterr().out == "a\tfirst\nc\tthird\n"


def test_the_benchmark_lets_both_ways_say_the_same_amount(run: Path, folder: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the line", "hold", "please hold your call now", "busy"]
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(json.dumps({"id": f"c{i}", "audio": f"good-{i}.flac", "task": "asr", "target": text}) +
                                "\n" for i, text in enumerate(texts)))
    said: list[tuple[int, int, int]] = []  # rows, longest clip in mel frames, tokens
    generate = Listen.generate

    def noted(self: Listen, batch: Batch, *words: object, **options: object):  # type: ignore[no-untyped-def]
        ids, matched = generate(self, batch, *words, **options)  # type: ignore[arg-type]
        said.append((len(batch), batch.audio.shape[2], sum(map(len, ids))))
        return ids, matched

    monkeypatch.setattr(Listen, "generate", noted)
    assert bench_infer.main(["--checkpoint", str(run), "--manifest", str(manifest), "--device", "cpu", "--json"]) == 0
    manifest.unlink()
    result = json.loads(capsys.readouterr().out)
    speed = {(row["way"], row["batch"]): row["clips_per_second"] for row in result["rows"]}
    assert set(speed) == {("padded", 1), ("batched", 1), ("batched", 8), ("batched", 32)}
    assert result["summary"]["over_one_at_a_time"] == speed["batched", 8] / speed["padded", 1] > 1
    # Each way: a warm-up, all clips, and the first token of each clip.
    padded, single, batched = said[:9], said[9:18], said[18:24]
    assert {frames for _, frames, _ in padded} == {3000} and max(frames for _, frames, _ in single) == 310
    assert sum(n for _, _, n in padded[1:5]) == sum(n for _, _, n in single[1:5]) == batched[1][2] > len(texts)
    assert batched[1][0] == 4


def test_nothing_heavy_is_imported_for_help() -> None:
    code = ("import sys, listen_dist, listen_dist.infer as infer\n"
            "try: infer.main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'\n")
    done = launching.run([sys.executable, "-c", code], 60).check()
    assert "Exit codes" in done.output


def test_ask_takes_the_tasks_own_choices_unless_asked_otherwise() -> None:
    assert Ask("speaker_verification").all_choices == ("yes", "no")
    assert Ask("speaker_verification", "How many?").all_choices == ()
    assert Ask("asr", choices=("a", "b")).all_choices == ("a", "b")
