"""Which step was best, and when a task is being forgotten: by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from listen_dist.evaluation.dev import DevHistory, Score, mean_ranks


def scores(asr: float, language: float) -> dict[str, Score]:
    return {"asr": Score("wer", "lower", asr), "language_id": Score("accuracy", "higher", language)}


def best(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "best.json").read_text())["best"]


def walk(folder: Path, rows: list[tuple[float, float]], history: DevHistory | None = None) -> list[tuple[bool, list]]:
    history = history or DevHistory(folder, 0)
    found = []
    for number, row in enumerate(rows, 1):
        (folder / f"step-{10 * number:06d}").mkdir(exist_ok=True)
        found.append(history.add(10 * number, scores(*row)))
    return found


def test_the_best_step_of_each_task_and_of_all(tmp_path: Path) -> None:
    found = walk(tmp_path, [(0.9, 0.5), (0.5, 0.6), (0.6, 0.8), (0.7, 0.7)])
    assert [is_best for is_best, _ in found] == [True, True, True, False]
    assert best(tmp_path) == {"asr": {"step": 20, "metric": "wer", "value": 0.5},
                              "language_id": {"step": 30, "metric": "accuracy", "value": 0.8},
                              "mean_rank": {"step": 30, "value": 1.5}}
    columns = [[0.9, 0.5, 0.6, 0.7], [-0.5, -0.6, -0.8, -0.7], [1.0, 1.0, 0.0, 1.0]]
    assert mean_ranks(columns) == rankdata(columns, axis=1).mean(0).tolist()


def test_a_run_that_goes_on_knows_its_past_and_one_that_went_back_forgets_the_rest(tmp_path: Path) -> None:
    walk(tmp_path, [(0.9, 0.5), (0.5, 0.6)])
    again = DevHistory(tmp_path, 20)
    assert again.add(30, scores(0.7, 0.6)) == (False, []) and best(tmp_path)["asr"]["step"] == 20
    back = DevHistory(tmp_path, 10)
    assert back.add(20, scores(0.8, 0.6))[0] and best(tmp_path)["asr"] == {"step": 20, "metric": "wer", "value": 0.8}


def test_the_mean_rank_names_no_checkpoint_that_is_gone(tmp_path: Path) -> None:
    history = DevHistory(tmp_path, 0)
    walk(tmp_path, [(0.5, 0.5), (0.4, 0.55), (0.3, 0.6)], history)
    (tmp_path / "step-000030").rmdir()
    history.add(40, scores(0.9, 0.1))
    assert best(tmp_path)["mean_rank"]["step"] == 20 and best(tmp_path)["asr"]["step"] == 30


def test_a_task_that_falls_while_another_rises_is_named(tmp_path: Path) -> None:
    found = walk(tmp_path, [(0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.4)])
    assert [bool(warnings) for _, warnings in found] == [False, False, False, True]
    assert found[-1][1] == ["dev score of asr has been below that of step 10 for 3 evaluations while language_id "
                            "improved: it is being forgotten, or over-fitted"]


def test_when_all_fall_or_one_is_flat_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert not any(warnings for _, warnings in walk(tmp_path / "a", [(0.5, 0.9), (0.6, 0.8), (0.7, 0.7), (0.8, 0.6)]))
    (tmp_path / "b").mkdir()
    assert not any(warnings for _, warnings in walk(tmp_path / "b", [(0.5, 0.9)] * 5))
