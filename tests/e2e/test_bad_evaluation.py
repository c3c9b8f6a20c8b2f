"""Evaluations that should not be, or were interrupted: refused in one line, or gone on with to the same figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from listen_dist import evaluate as evaluation
from listen_dist.evaluation.decoding import Decoder
from listen_dist.evaluation.predictions import PartialFile, Prediction
from listen_dist.structures import Batch, Record
from tests import tiny
from tests.e2e.test_bad_input import Program, error_of, program, spoil, state_of  # noqa: F401
from tests.fixtures import TrainedRun

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


def results_of(folder: Path, name: str = "results.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("word, key", [
    ("model.before_audio=x", "model.before_audio"), ("pool.prompts=12", "pool.prompts"),
    ("projector.window=0.2", "projector.window"),
])
def test_a_checkpoint_of_another_model_is_refused(program: Program, trained: TrainedRun,  # noqa: F811
                                                  tmp_path: Path, word: str, key: str) -> None:
    line = error_of(program(evaluation.main, f"run_dir={trained.folder}", "--out", str(tmp_path / "out"), word))
    assert f"step-000012: belongs to another model; these keys differ: {key}. Evaluate with --config" in line
    assert not (tmp_path / "out").exists()


def test_a_task_that_was_never_trained_is_named(program: Program, trained: TrainedRun,  # noqa: F811
                                                tmp_path: Path) -> None:
    choices = {"choices": ["sad", "glad"]}
    records = [Record(f"clip-{i}", (), "emotion", ("sad", "glad", "angry")[i % 3], meta=choices) for i in range(6)]
    tiny.write_set(tmp_path / "set", records)
    code, output = program(evaluation.main, f"run_dir={trained.folder}", "--out", str(tmp_path / "out"),
                           f"data.test=[{{path: {tmp_path / 'set'}}}]")
    assert code == 0 and "never trained in this checkpoint: emotion" in output, output
    found = results_of(tmp_path / "out")
    assert found["untrained_tasks"] == ["emotion"]
    assert found["skipped"] == 2 and found["tasks"]["emotion"]["samples"] == 4  # "angry" is not among the choices
    named = [json.loads(line) for line in (tmp_path / "out/eval_skipped.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in named) == ["clip-2", "clip-5"]
    assert all("is not among the choices" in row["reason"] for row in named)
    assert found["tasks"]["emotion"]["skipped"] == 2
    assert "emotion: 2 of 6 samples could not be used; the figures are of the rest" in output


def test_splits_without_a_usable_sample_and_sets_named_twice(program: Program, trained: TrainedRun,  # noqa: F811
                                                             tmp_path: Path) -> None:
    tiny.write_set(tmp_path / "bad", tiny.speech_records(2))
    spoil(tmp_path / "bad", 9)
    run = (f"run_dir={trained.folder}", "--out", str(tmp_path / "out"))
    line = error_of(program(evaluation.main, *run, f"data.test=[{{path: {tmp_path / 'bad'}}}]"))
    assert "no prediction to score; is the split empty, or was every sample skipped?" in line
    twice = f"data.test=[{{path: {tmp_path / 'bad'}}}, {{path: {tmp_path}/../{tmp_path.name}/bad}}]"
    assert "data.test: names a set twice" in error_of(program(evaluation.main, *run, twice))
    assert not list((tmp_path / "out").glob("results*"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".evaluation.lock")


def test_the_folder_of_results_is_tried_before_a_model_is_loaded(program: Program, untrained: Path,  # noqa: F811
                                                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 ) -> None:
    monkeypatch.setattr(evaluation, "assemble", lambda *_: pytest.fail("a model was loaded"))
    run = (f"run_dir={untrained}", "--out")
    line = error_of(program(evaluation.main, *run, "/proc/results"))
    assert "--out = '/proc/results': cannot be written: " in line and "choose another folder" in line
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("wb"))
        assert "No space left on device" in error_of(program(evaluation.main, *run, str(tmp_path / "out")))
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        line = error_of(program(evaluation.main, *run, str(tmp_path / "out")))
        assert f"in use by process {other.pid} on" in line and "wait for its end, or choose another --out" in line
        other.communicate()


HOLDER = """
import sys, pathlib
from listen_dist.engine.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]), ".evaluation.lock", "--out")
print("held", flush=True)
sys.stdin.read()
"""


class Interrupted(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ids that are answered."""
    ids: list[str] = []
    answer = Decoder._split

    def split(self: Decoder, batch: Batch) -> tuple[Batch, Batch]:
        ids.extend(batch.ids)
        return answer(self, batch)

    monkeypatch.setattr(Decoder, "_split", split)
    yield ids


def test_an_interrupted_evaluation_goes_on_or_refuses(program: Program, trained: TrainedRun,  # noqa: F811
                                                      tmp_path: Path, decoded: list[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    run = (f"run_dir={trained.folder}", "eval.batch_tokens=64")
    out = ("--out", str(tmp_path / "out"))
    assert program(evaluation.main, *run, "--out", str(tmp_path / "unbroken"))[0] == 0
    decoded.clear()

    def add(self: PartialFile, fingerprint: str, rows: list[Prediction]) -> None:
        plain_add(self, fingerprint, rows)
        raise Interrupted

    plain_add = PartialFile.add
    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "add", add)
        with pytest.raises(Interrupted):
            program(evaluation.main, *run, *out)
    assert len(decoded) == 1 and names_in(tmp_path / "out") == ["partial.test"]
    before = state_of(tmp_path / "out")
    line = error_of(program(evaluation.main, *run, *out, "eval.beams=2", "pool.top_k=3"))
    assert "partial.test: holds an interrupted evaluation that differs in decoding, k; finish it" in line
    assert state_of(tmp_path / "out") == before
    assert program(evaluation.main, *run, *out)[0] == 0
    assert len(decoded) == len(set(decoded)) == 7
    assert results_of(tmp_path / "out")["tasks"] == results_of(tmp_path / "unbroken")["tasks"]
    assert names_in(tmp_path / "out") == [
        "eval_skipped.jsonl", "predictions.jsonl", "results.json"]


def test_two_splits_make_two_results(program: Program, trained: TrainedRun, tiny_world: tiny.Tiny,  # noqa: F811
                                     tmp_path: Path) -> None:
    code, output = program(evaluation.main, f"run_dir={trained.folder}", "--out", str(tmp_path), "eval.limit=2",
                           "eval.splits=[dev,test]", f"data.dev=[{{path: {tiny_world.speech}}}]")
    assert code == 0, output
    assert [results_of(tmp_path, f"results.{split}.json")["split"] for split in ("dev", "test")] == ["dev", "test"]
    assert sorted(path.name for path in tmp_path.glob("predictions*")) == [
        "predictions.dev.jsonl", "predictions.test.jsonl"]
    for word in ("eval.splits=[]", "eval.splits=[test,test]", "eval.splits=[train]"):
        assert "must be [dev], [test] or [dev,test]" in error_of(program(evaluation.main, word))
