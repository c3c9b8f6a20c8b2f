"""From the predictions of a task to its figures: which metrics, with which intervals, beside which baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from listen_dist.errors import ListenError
from listen_dist.evaluation.bootstrap import Figure, interval
from listen_dist.evaluation.captions import TOKENIZERS, caption_figures
from listen_dist.evaluation.metrics import (
    NoWordsError,
    answer_figures,
    bleu_figures,
    choice_figures,
    most_frequent,
    values,
    wer_figures,
)
from listen_dist.evaluation.predictions import Prediction
from listen_dist.evaluation.wording import NORMALIZERS, is_unspaced, normalize, rules_for
from listen_dist.tasks import check_answers, get_task

COUNTS = ("insertions", "deletions", "substitutions", "reference_words", "reference_characters")
"""Ends of names of figures that are sums, which grow with the set."""


def lower_is_better(metric: str) -> bool:
    """Whether a figure counts mistakes."""
    name = metric.removesuffix("_basic")
    return name in ("wer", "cer", "eer") or name.endswith("_share")


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
        return score_transcripts(rows)
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


def score_transcripts(rows: Sequence[Prediction]) -> TaskScores:
    """Error rates of words and characters; the main one is of characters where the script knows no spaces."""
    meant = [row.answers[0] for row in rows]
    rules = [rules_for(row.language, text) for row, text in zip(rows, meant, strict=True)]
    main = "cer" if is_unspaced([normalize(*row) for row in zip(meant, rules, strict=True)]) else "wer"
    try:
        figures = wer_figures([row.text for row in rows], meant, [row.language for row in rows])
    except NoWordsError as error:
        return TaskScores(main, "lower", {}, {main: f"not computed, because {error}"})
    unnamed = sum(not row.language for row in rows)
    used = "; ".join(f"{NORMALIZERS[name]}: {count} clips" for name, count in Counter(rules).items())
    used += f"; {unnamed} of them name no language, and English was taken where all letters are Latin" * bool(unnamed)
    if main == "cer":
        used += "; written without spaces, so the main figure is of characters, and each counts as a word in wer"
    return TaskScores(main, "lower", figures, computed_by={
        "wer": used, "cer": used, "wer_basic": NORMALIZERS["basic"], "cer_basic": NORMALIZERS["basic"]})


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
    indifferent = [replace(row, text=text, likelihoods=(0.0,) * len(row.likelihoods)) for row in rows]
    return "silence" if silent else "most_frequent", indifferent


def entry_for(task: str, rows: Sequence[Prediction], scores: TaskScores | None = None) -> dict[str, Any]:
    """results.json's entry of a task: its metrics with 95 % intervals beside those of the trivial baseline.

    Args:
        scores: of `score_task`, where they are there already.
    """
    scores = scores or score_task(task, rows)
    name, indifferent = baseline_for(task, rows)
    return {
        "samples": len(rows), "metric": scores.metric, "better": scores.better, "metrics": values(scores.figures),
        "intervals": {key: interval(figure) for key, figure in scores.figures.items() if not is_count(key)},
        "not_computed": dict(scores.not_computed), "computed_by": dict(scores.computed_by),
        "baseline": values(score_task(task, indifferent, java=False).figures), "baseline_name": name,
        "instruction": get_task(task).instruction or "the sample's own question",
        "answered_by": dict(Counter("likelihood" if row.likelihoods else "generation" for row in rows)),
        "ended_by": dict(Counter(row.ended for row in rows if row.ended)),
        **({"references_without_words": sum(not normalize(row.answers[0], rules_for(row.language, row.answers[0]))
                                            for row in rows)} if get_task(task).metric == "wer" else {}),
    }


def own_scores(scores: TaskScores, clips: int) -> list[dict[str, float | None]]:
    """Each clip's own main figure, None where its reference holds no word; nothing where clips have none (BLEU)."""
    figure = scores.figures.get(scores.metric)
    if figure is None or not figure.each:
        return [{} for _ in range(clips)]
    return [{scores.metric: value if math.isfinite(value) else None} for value in figure.each]


def is_count(metric: str) -> bool:
    """Whether a figure is a sum over clips, which has no interval of use."""
    return metric.removesuffix("_basic").endswith(COUNTS)


def check_references(rows: Sequence[Prediction]) -> None:
    """Raise ListenError unless there are rows, each with right answers (`tasks.check_answers`)."""
    if not rows:
        raise ListenError("no prediction to score; is the split empty, or was every sample skipped?")
    for row in rows:
        try:
            check_answers(row.task, row.answers)
        except ListenError as error:
            raise ListenError(f"sample {row.id!r} has no reference ({error}) in the manifest; write the shard anew") \
                from None
