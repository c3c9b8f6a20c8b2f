"""Partial results: what a restart takes over, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import PartialFile, Prediction, clear, read_predictions, take_over
from listen_dist.evaluation.report import read_run
from listen_dist.evaluation.results import score_and_write
from listen_dist.structures import SkippedSample
from tests import tiny

HEADER = {"split": "test", "k": 4, "decoding": {"beams": 1}, "data": ("a", "b")}


def prediction(name: str) -> Prediction:
    return Prediction(name, "asr", "two\u2028lines, ünïcode", ("x",), (3, 1), (0.5, 0.25), ("a", "b"), (-1.0, -2.5))


def test_what_all_ranks_left_is_taken_over_once(tmp_path: Path) -> None:
    folder = tmp_path / "partial.test"
    assert take_over(folder, HEADER) == {}
    for rank, names in enumerate([["a", "b"], ["c"]]):
        file = PartialFile(folder, rank)
        file.add("set-1", [prediction(name) for name in names])
        file.add("set-2", [prediction("a")])  # the same id in another set is another sample
        file.close()
    with (folder / "rank-1.jsonl").open("a") as broken:
        broken.write('{"set": "set-1", "id": "d", "ta')
    for _ in range(2):
        done = take_over(folder, HEADER)
        assert {name: sorted(row.id for row in rows) for name, rows in done.items()} == {
            "set-1": ["a", "b", "c"], "set-2": ["a"]}
        assert done["set-2"] == [prediction("a")]
        assert sorted(path.name for path in folder.iterdir()) == ["header.json", "rank-0.jsonl"]
    clear(folder)
    assert take_over(folder, {**HEADER, "k": 9}) == {}


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    take_over(tmp_path, HEADER)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ListenError, match="an interrupted evaluation that differs in decoding, k; finish it with"):
        take_over(tmp_path, {**HEADER, "k": 5, "decoding": {"beams": 4}})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_text_with_another_kind_of_line_end_is_read_again(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    row = Prediction("a", "asr", "one\u2028two\x85three", ("one\u2028two",), (), ())
    results = score_and_write(tmp_path, "", {}, [row], [SkippedSample("b", "s.tar", "damaged", "asr")])
    assert results["tasks"]["asr"]["skipped"] == 1
    (tmp_path / "config.yaml").write_text(tiny_world.config_file.read_text(encoding="utf-8"), encoding="utf-8")
    assert [found["text"] for found in read_run(tmp_path).predictions] == [row.text]
    assert read_predictions(tmp_path / "predictions.jsonl") == [row]


@pytest.mark.parametrize("damage", [
    "\0" * 40, '{"set": "s", "id": "a"}', '{"set": "s", "id": "a", "ta', "[1]", '{"id": "b"}', "\ufffd", '{"set": 3}'])
def test_a_damaged_line_is_dropped_and_named(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    take_over(tmp_path, HEADER)
    file = PartialFile(tmp_path, 0)
    file.add("s", [prediction("a")])
    file.close()
    with (tmp_path / "rank-0.jsonl").open("a", encoding="utf-8") as broken:
        broken.write(damage + "\n")
    PartialFile(tmp_path, 1).add("s", [prediction("c")])
    assert [row.id for row in take_over(tmp_path, HEADER)["s"]] == ["a", "c"]
    assert "rank-0.jsonl:2: damaged, dropped; its sample is decoded again" in caplog.text
    assert [row.id for row in take_over(tmp_path, HEADER)["s"]] == ["a", "c"]


def test_without_a_readable_header_all_are_decoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    take_over(tmp_path, HEADER)
    PartialFile(tmp_path, 0).add("s", [prediction("a")])
    (tmp_path / "header.json").write_text("\0\0\0", encoding="utf-8")
    assert take_over(tmp_path, HEADER) == {} and "header.json: damaged" in caplog.text
    assert take_over(tmp_path, HEADER) == {}


@pytest.mark.parametrize("line, message", [
    ('{"id": "a", "task": ["asr"]}', "task: Input should be a valid string"),
    ('{"id": "a"}', "Field required"),
    ("[" * 100_000, "recursion limit"),
    ('{"id": "\\ud800"}', "unexpected end of hex escape"),
    ("\\xff", "Invalid JSON"),
])
def test_a_line_that_is_no_prediction_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(b"\n" + line.encode("latin-1"))
    with pytest.raises(ListenError, match=f"predictions.jsonl:2: not a prediction.*{message}"):
        read_predictions(file)
