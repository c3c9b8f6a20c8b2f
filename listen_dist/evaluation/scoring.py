"""From the predictions of a task to its figures: which metrics, with which intervals, beside which baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from listen_dist.errors import ListenError
from listen_dist.evaluation.bootstrap import Figure, interval
from listen_dist.evaluation.captions import TOKENIZERS, caption_figures
from listen_dist.evaluation.metrics import (
    NORMALIZERS,
    answer_figures,
    bleu_figures,
    choice_figures,
    most_frequent,
    values,
    wer_figures,
)
from listen_dist.evaluation.predictions import Prediction
from listen_dist.tasks import get_task

COUNTS = ("insertions", "deletions", "substitutions")
"""Beginnings and ends of names of figures that are sums, which grow with the set."""
LOWER = ("wer", "cer", "wer_basic", "cer_basic", "eer")


@dataclass(frozen=True)
class TaskScores:
    """All figures of one task."""

    metric: str
    """The main one."""
    better: Literal["lower", "higher"]
    figures: Mapping[str, Figure]
    not_computed: Mapping[str, str] = field(default_factory=dict)
    """Metric → reason."""
    computed_by: Mapping[str, str] = field(default_factory=dict)
    """Metric → sacrebleu's signature, or how the texts were split into words."""


def score_task(task: str, rows: Sequence[Prediction], java: bool = True) -> TaskScores:
    """Score the predictions of one task.

    Args:
        java: False leaves out the caption metrics that start Java programs.

    Raises:
        ListenError: no prediction at all, or one without a reference.
    """
    check_references(rows)
    known = get_task(task)
    said, answers = [row.text for row in rows], [row.answers for row in rows]
    first = [row[0] for row in answers]
    if known.metric == "wer":
        names = {f"{unit}{suffix}": NORMALIZERS[language] for unit in ("wer", "cer")
                 for language, suffix in (("english", ""), ("basic", "_basic"))}
        return TaskScores("wer", "lower", wer_figures(said, first), computed_by=names)
    if known.metric == "bleu":
        figures, signatures = bleu_figures(said, first)
        return TaskScores("bleu", "higher", figures, computed_by=signatures)
    if known.metric == "cider_d":
        figures, left_out = caption_figures(said, answers, java)
        return TaskScores("cider_d", "higher", figures, left_out,
                          {name: TOKENIZERS[name] for name in figures})
    if task == "speech_qa" and not all(row.choices for row in rows):
        return TaskScores("rouge_l", "higher", answer_figures(said, answers),
                          computed_by=dict.fromkeys(("exact_match", "rouge_l"), NORMALIZERS["basic"]))
    return TaskScores("accuracy", "higher", choice_figures(said, first, log_odds(rows)),
                      computed_by={"accuracy": NORMALIZERS["basic"]})


def log_odds(rows: Sequence[Prediction]) -> list[float]:
    """log p(yes) − log p(no) of each sample where all were asked so and both answers occur; else empty."""
    if not all(row.likelihoods and sorted(row.choices) == ["no", "yes"] for row in rows):
        return []
    if len({row.answers[0] for row in rows}) < 2:
        return []
    return [row.likelihoods[row.choices.index("yes")] - row.likelihoods[row.choices.index("no")] for row in rows]


def baseline_for(task: str, rows: Sequence[Prediction]) -> tuple[str, list[Prediction]]:
    """What a model that does not listen would say: silence for text, else the split's most frequent answer.

    Returns:
        the baseline's name, and its predictions.
    """
    silent = get_task(task).metric in ("wer", "bleu")
    text = "" if silent else most_frequent([row.answers for row in rows])
    indifferent = [Prediction(row.id, task, text, row.answers, (), (), row.choices, (0.0,) * len(row.likelihoods))
                   for row in rows]
    return "silence" if silent else "most_frequent", indifferent


def entry_for(task: str, rows: Sequence[Prediction]) -> dict[str, Any]:
    """results.json's entry of a task: its metrics with 95 % intervals beside those of the trivial baseline."""
    scores = score_task(task, rows)
    name, indifferent = baseline_for(task, rows)
    return {
        "samples": len(rows), "metric": scores.metric, "better": scores.better, "metrics": values(scores.figures),
        "intervals": {key: interval(figure) for key, figure in scores.figures.items() if not is_count(key)},
        "not_computed": dict(scores.not_computed), "computed_by": dict(scores.computed_by),
        "baseline": values(score_task(task, indifferent, java=False).figures), "baseline_name": name,
        "instruction": get_task(task).instruction or "the sample's own question",
        "answered_by": dict(Counter("likelihood" if row.likelihoods else "generation" for row in rows)),
    }


def is_count(metric: str) -> bool:
    """Whether a figure is a sum over clips, which has no interval of use."""
    return metric.removesuffix("_basic").endswith(COUNTS)


def check_references(rows: Sequence[Prediction]) -> None:
    """Raise ValueError unless there are rows, each with a right answer."""
    if not rows:
        raise ListenError("no prediction to score; is the split empty, or was every sample skipped?")
    for row in rows:
        if not row.answers or not all(answer.strip() for answer in row.answers):
            raise ListenError(f"sample {row.id!r} has no reference; give `target` or `references` in the manifest "
                             "and write the shard anew")
