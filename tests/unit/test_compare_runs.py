"""tools/compare_runs.py as a program's function: what it finds, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import Prediction, to_lines

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare_runs

pytestmark = pytest.mark.timeout(120)


def run(folder: Path, rows: list[Prediction], split: str = "test", fingerprint: str = "f") -> Path:
    folder.mkdir()
    (folder / "predictions.jsonl").write_text(to_lines(rows))
    (folder / "results.json").write_text(json.dumps({"split": split, "data_fingerprints": {"here": fingerprint}}))
    return folder


def clips(right: int, count: int = 60) -> list[Prediction]:
    """The first `right` are transcribed right; `language_id` is always right."""
    return [row for i in range(count) for row in (
        Prediction(f"clip-{i:02d}", "asr", "busy line" if i < right else "lazy dog", ("busy line",), (), ()),
        Prediction(f"clip-{i:02d}", "language_id", "english", ("english",), (), ()))]


def test_a_better_run_is_found_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", clips(20)), run(tmp_path / "b", list(reversed(clips(45))))
    assert compare_runs.main([str(a), str(b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    wer = next(line for line in lines if " wer " in line)
    assert "0.667" in wer and "0.250" in wer and "-0.417" in wer and wer.endswith("B is better")
    assert next(line for line in lines if " accuracy " in line).split()[-1] == "1.000"
    assert compare_runs.main([str(b), str(a), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["asr"]["wer"]
    assert row["samples"] == 60 and row["better"] == "lower" and row["p"] < 0.01
    assert row["low"] < 25 / 60 < row["high"] and row["second"] - row["first"] == pytest.approx(25 / 60)


@pytest.mark.parametrize("change, part", [
    (lambda rows: rows[2:], "2 samples of .*/a are not in .*/b, the first 'clip-00'"),
    (lambda rows: [replace(rows[0], id="other"), *rows[1:]], "1 samples of .*/a are not in .*/b, the first 'clip-00'"),
    (lambda rows: [replace(rows[0], answers=("free line",)), *rows[1:]], "sample 'clip-00': the references differ"),
])
def test_runs_over_other_samples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object,
                                             part: str) -> None:
    a, b = run(tmp_path / "a", clips(20)), run(tmp_path / "b", change(clips(20)))  # type: ignore[operator]
    with pytest.raises(ListenError, match=part):
        compare_runs.compare_runs(a, b)
    assert compare_runs.main([str(a), str(b)]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_predictions_of_another_split_or_none_are_refused(tmp_path: Path) -> None:
    a = run(tmp_path / "a", clips(20))
    with pytest.raises(ListenError, match="is of split 'test', .* of 'dev'"):
        compare_runs.compare_runs(a, run(tmp_path / "b", clips(20), split="dev"))
    with pytest.raises(ListenError, match="bytes differ"):
        compare_runs.compare_runs(a, run(tmp_path / "c", clips(20), fingerprint="g"))
    with pytest.raises(FileNotFoundError, match="no predictions here"):
        compare_runs.compare_runs(a, tmp_path)
    (a / "predictions.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ListenError, match="predictions.jsonl:1: not a prediction"):
        compare_runs.compare_runs(a, a)
