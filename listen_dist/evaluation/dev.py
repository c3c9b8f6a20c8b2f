"""Small dev evaluations while a model trains: the best step of each task, and of all together.

`checkpoints/best.json` holds them,

    {"history": [{"step": 200, "scores": {"asr": 0.71, …}}, …],
     "best": {"asr": {"step": 200, "metric": "wer", "value": 0.71}, …, "mean_rank": {"step": 200, "value": 1.5}}}

and the checkpoints it names outlive `train.keep`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from listen_dist import dist
from listen_dist.engine.assembly import Parts
from listen_dist.errors import ListenError
from listen_dist.evaluation.decoding import Decoder, UnscorableError
from listen_dist.evaluation.placement import placed
from listen_dist.evaluation.predictions import Prediction, write_file
from listen_dist.evaluation.scoring import score_task
from listen_dist.structures import SkippedSample

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Evaluations in a row that a task stays below its best, while another reaches its own, before the warning."""


@dataclass(frozen=True)
class Score:
    """A task's main metric on the dev sets."""

    metric: str
    better: str
    value: float

    @property
    def badness(self) -> float:
        """Smaller is better, whatever the metric."""
        return self.value if self.better == "lower" else -self.value


def evaluate_dev(parts: Parts) -> dict[str, Score]:
    """Decode `train.eval_limit` samples of each dev set greedily and score them. Every rank must call it.

    What can't be read or scored is warned of: training goes on without it.
    """
    config = parts.config
    # Loader processes started for so few samples would take longer than the reading.
    config = replace(config, data=replace(config.data, workers=0),
                     eval=replace(config.eval, limit=config.train.eval_limit, beams=1, length_penalty=1.0))
    parts = replace(parts, config=config)
    rows: list[Prediction] = []
    skipped: list[SkippedSample] = []
    parts.model.eval()
    with placed(parts) as whole:
        decoder = Decoder(parts, config.eval, config.pool.k, whole)
        for entry in config.data.dev:
            try:
                decoded, unread = decoder.decode_set(parts.reader([entry], with_targets=False))
                rows += decoded
                skipped += unread
            except UnscorableError as error:
                _warn("a set of data.dev is left out: %s", error)
    parts.model.train()
    if skipped:
        _warn("data.dev: %d samples skipped: %s", len(skipped),
              "; ".join(f"{sample.id}: {sample.reason}" for sample in skipped))
    if not rows:
        _warn("data.dev: no sample could be used; there are no dev scores")
    found = {}
    for task in sorted({row.task for row in rows}):
        try:
            scores = score_task(task, [row for row in rows if row.task == task], java=False)
        except ListenError as error:
            _warn("data.dev: no score of %s: %s", task, error)
            continue
        if scores.metric in scores.figures:
            found[task] = Score(scores.metric, scores.better, scores.figures[scores.metric].value)
        else:
            _warn("data.dev: %s of %s is %s", scores.metric, task, scores.not_computed[scores.metric])
    return found


def _warn(message: str, *words: object) -> None:
    if dist.is_main():
        logger.warning(message, *words)


class DevHistory:
    """The scores of a run's dev evaluations, and which step was best.

    Args:
        folder: of the checkpoints.
        step: where the run stands; what a run that went back had scored later is dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._file = folder / "best.json"
        tree = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {"history": []}
        self.history: list[dict[str, Any]] = [row for row in tree["history"] if row["step"] <= step]

    def add(self, step: int, scores: Mapping[str, Score]) -> tuple[bool, list[str]]:
        """Note an evaluation; rank 0 writes best.json.

        Returns:
            whether this step is the best in anything, so that its checkpoint should be kept; and warnings.
        """
        self.history = [row for row in self.history if row["step"] != step]
        self.history.append({"step": step, "scores": {task: score.value for task, score in scores.items()}})
        held = {int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*")} | {step}
        best: dict[str, Any] = {}
        badness = {task: [self._signed(row["scores"].get(task), score) for row in self.history]
                   for task, score in scores.items()}
        for task, score in scores.items():
            place = best_place(badness[task])
            best[task] = {"step": self.history[place]["step"], "metric": score.metric,
                          "value": self.history[place]["scores"][task]}
        if scores:
            ranks = mean_ranks(list(badness.values()))
            place = min((i for i, row in enumerate(self.history) if row["step"] in held), key=lambda i: ranks[i])
            best["mean_rank"] = {"step": self.history[place]["step"], "value": ranks[place]}
        if dist.is_main():
            write_file(self._file, json.dumps({"history": self.history, "best": best}, indent=1) + "\n")
        return any(entry["step"] == step for entry in best.values()), self._warnings(badness)

    @staticmethod
    def _signed(value: float | None, score: Score) -> float:
        return float("inf") if value is None else replace(score, value=value).badness

    def _warnings(self, badness: Mapping[str, Sequence[float]]) -> list[str]:
        places = {task: best_place(values) for task, values in badness.items()}
        last = len(self.history) - 1
        rising = [task for task, place in places.items() if last - place < PATIENCE and place > 0]
        return [f"dev score of {task} has been below that of step {self.history[place]['step']} for "
                f"{last - place} evaluations while {', '.join(rising)} improved: it is being forgotten, or over-fitted"
                for task, place in places.items() if last - place >= PATIENCE and rising]


def best_place(badness: Sequence[float]) -> int:
    """The first of the smallest."""
    return min(range(len(badness)), key=badness.__getitem__)


def mean_ranks(columns: Sequence[Sequence[float]]) -> list[float]:
    """The mean over tasks of each evaluation's rank within the task (1 is best; ties share the mean rank)."""
    def rank(column: Sequence[float], value: float) -> float:
        return 1 + sum(other < value for other in column) + (sum(other == value for other in column) - 1) / 2

    return [sum(rank(column, column[i]) for column in columns) / len(columns) for i in range(len(columns[0]))]
