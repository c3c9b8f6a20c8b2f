"""Scores of a task's texts. Plain functions: strings in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import jiwer
import numpy as np
import sacrebleu
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from listen_dist.tasks import get_task


@cache
def _normalizer(language: str) -> EnglishTextNormalizer | BasicTextNormalizer:
    return EnglishTextNormalizer() if language == "english" else BasicTextNormalizer()


def normalize(text: str, language: str = "english") -> str:
    """Whisper's text normalisation: English rules (numbers, spelling, fillers) or the basic ones."""
    return _normalizer(language)(text).strip()


def wer_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Word and character error rate over the whole corpus, both sides normalised as Whisper does.

    WER = (insertions + deletions + substitutions) / reference words; it can pass 1.

    Raises:
        ValueError: lengths differ, or no reference has a word left after normalisation.
    """
    _same_length(hypotheses, references)
    pairs = [(normalize(h), normalize(r)) for h, r in zip(hypotheses, references, strict=True)]
    pairs = [(h, r) for h, r in pairs if r]
    if not pairs:
        raise ValueError("wer_scores: no reference with a word in it")
    hyp, ref = [h for h, _ in pairs], [r for _, r in pairs]
    words, characters = jiwer.process_words(ref, hyp), jiwer.process_characters(ref, hyp)
    return {"wer": words.wer, "cer": characters.cer, "insertions": float(words.insertions),
            "deletions": float(words.deletions), "substitutions": float(words.substitutions)}


def choice_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Accuracy over samples (weighted) and the mean of the per-answer recalls (unweighted).

    Both sides are compared after Whisper's basic normalisation.
    """
    _same_length(hypotheses, references)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        answer = normalize(reference, "basic")
        total[answer] += 1
        right[answer] += normalize(hypothesis, "basic") == answer
    return {"accuracy": right.total() / max(1, total.total()),
            "unweighted_accuracy": sum(right[a] / total[a] for a in total) / max(1, len(total))}


def equal_error_rate(scores: Sequence[float], is_target: Sequence[bool]) -> float:
    """The error rate at the threshold where misses and false alarms are equally frequent.

    Between two thresholds both rates are taken to change linearly, as on the ROC curve.

    Args:
        scores: higher where a target is more likely (any scale).
        is_target: the truth, at least one of each kind.

    Raises:
        ValueError: lengths differ, or only one kind is there.
    """
    _same_length(scores, is_target)
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(is_target, dtype=bool)
    if truth.all() or not truth.any():
        raise ValueError("equal_error_rate: needs targets and others, found one kind alone")
    _, place = np.unique(-values, return_inverse=True)  # equal scores share a threshold
    hits, alarms = np.bincount(place, truth), np.bincount(place, ~truth)
    misses = 1 - np.cumsum(np.append(0, hits)) / truth.sum()
    alarms = np.cumsum(np.append(0, alarms)) / (~truth).sum()
    after = int(np.argmax(alarms >= misses))
    gap = misses[after - 1] - alarms[after - 1]
    step = gap - (misses[after] - alarms[after])
    return float(alarms[after - 1] + gap / step * (alarms[after] - alarms[after - 1]))


def bleu_scores(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, float]:
    """Corpus BLEU and chrF by sacrebleu; `tokenize="zh"` for Chinese targets."""
    _same_length(hypotheses, references)
    return {"bleu": sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=tokenize).score,
            "chrf": sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score}


def caption_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D over the corpus by aac-metrics, words lower-cased and without punctuation.

    The corpus decides the words' weights (inverse document frequency), so it needs at
    least two samples, and figures of different splits cannot be compared.
    """
    _same_length(hypotheses, references)
    from aac_metrics.functional import cider_d  # takes seconds to import

    corpus, _ = cider_d([normalize(h, "basic") for h in hypotheses],
                        [[normalize(r, "basic") for r in row] for row in references])
    return {"cider_d": float(corpus["cider_d"])}


def task_scores(task: str, hypotheses: Sequence[str], answers: Sequence[Sequence[str]],
                log_odds: Sequence[float] = ()) -> dict[str, float]:
    """The metrics of a task; the main one is `get_task(task).metric`.

    Args:
        log_odds: for a yes/no task, log p(yes) − log p(no) of each sample; gives the equal error rate.
    """
    metric = get_task(task).metric
    first = [row[0] for row in answers]
    if metric == "wer":
        return wer_scores(hypotheses, first)
    if metric == "bleu":
        return bleu_scores(hypotheses, first)
    if metric == "cider_d":
        return caption_scores(hypotheses, answers)
    scores = choice_scores(hypotheses, first)
    if log_odds:
        scores["eer"] = equal_error_rate(log_odds, [normalize(answer, "basic") == "yes" for answer in first])
    return scores


def baseline_hypotheses(task: str, answers: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
    """What a model that does not listen would say: silence for text, else the most frequent answer.

    Returns:
        the baseline's name and one hypothesis a sample, taken from the split itself.
    """
    if get_task(task).metric in ("wer", "bleu"):
        return "silence", [""] * len(answers)
    (answer, _), *_ = Counter(text for row in answers for text in row).most_common(1)
    return "most_frequent", [answer] * len(answers)


def _same_length(hypotheses: Sequence[object], references: Sequence[object]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references; "
                         "expected as many of each, and at least one")
