"""Scores of texts. Plain functions: strings in, numbers out.

`wer_scores` and its like give values; `wer_figures` and its like give the same as functions of how often
each clip is counted, from which bootstrap.py takes intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from listen_dist.errors import ListenError
from listen_dist.evaluation.bootstrap import Figure, ratio, total
from listen_dist.evaluation.captions import caption_figures
from listen_dist.evaluation.wording import bleu_tokenizer, letters, nfc, normalize, rules_for, words

EDITS = ("insertion", "deletion", "substitution")


class NoWordsError(ListenError):
    """No reference holds a word, so that no error rate exists."""


def wer_scores(hypotheses: Sequence[str], references: Sequence[str], languages: Sequence[str] = ()) -> dict[str, float]:
    """Word and character error rate over the whole corpus, both sides normalised as Whisper does.

    WER = (insertions + deletions + substitutions) / reference words; it can pass 1. `wer` and `cer` follow each
    clip's language (see `wording.rules_for`), `wer_basic` and `cer_basic` the basic rules for all. What is said
    to a reference without words counts as insertions. A character of a script without spaces counts as a word.

    Args:
        languages: of the references, as `en` or `zh-CN`; empty where unknown.

    Raises:
        ValueError: lengths differ.
        NoWordsError: no reference has a word left after normalisation.
    """
    return values(wer_figures(hypotheses, references, languages))


def wer_figures(hypotheses: Sequence[str], references: Sequence[str], languages: Sequence[str] = (),
                ) -> dict[str, Figure]:
    same_length(hypotheses, references)
    languages = languages or [""] * len(references)
    rules = [rules_for(*row) for row in zip(languages, references, strict=True)]
    figures: dict[str, Figure] = {}
    for suffix, chosen in (("", rules), ("_basic", ["basic"] * len(rules))):
        hyp, ref = ([normalize(*row) for row in zip(side, chosen, strict=True)] for side in (hypotheses, references))
        if not any(ref):
            raise NoWordsError("no reference has a word left once it is normalised")
        by_word = jiwer.process_words([words(text) for text in ref], [words(text) for text in hyp])
        by_letter = jiwer.process_characters([letters(text) for text in ref], [letters(text) for text in hyp])
        figures |= _edit_figures(by_word, "wer", "reference_words", "", suffix)
        figures |= _edit_figures(by_letter, "cer", "reference_characters", "character_", suffix)
    return figures


def _edit_figures(output: jiwer.WordOutput | jiwer.CharacterOutput, rate: str, size: str, prefix: str, suffix: str,
                  ) -> dict[str, Figure]:
    """An error rate, and its three parts: as counts and as shares of what the references hold."""
    edits, sizes = _edits(output), [len(row) for row in output.references]
    figures = {f"{rate}{suffix}": ratio(edits.sum(1).tolist(), sizes), f"{size}{suffix}": total(sizes)}
    for column, kind in zip(edits.T.tolist(), EDITS, strict=True):
        figures[f"{prefix}{kind}s{suffix}"] = total(column)
        figures[f"{prefix}{kind}_share{suffix}"] = ratio(column, sizes)
    return figures


def _edits(output: jiwer.WordOutput | jiwer.CharacterOutput) -> np.ndarray:
    """Insertions, deletions and substitutions of each sentence, float64 [sentences, 3]."""
    columns = {"insert": 0, "delete": 1, "substitute": 2}
    edits = np.zeros((len(output.alignments), 3))
    for row, alignment in enumerate(output.alignments):
        for chunk in alignment:
            if chunk.type in columns:
                size = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                edits[row, columns[chunk.type]] += size
    return edits


def choice_scores(hypotheses: Sequence[str], references: Sequence[str],
                  log_odds: Sequence[float] = ()) -> dict[str, float]:
    """Accuracy over samples (weighted) and the mean of the per-answer recalls (unweighted).

    Both sides are compared after Whisper's basic normalisation; an answer of signs alone stays as it is.

    Args:
        log_odds: for a yes/no task, log p(yes) − log p(no) of each sample; gives the equal error rate.
    """
    return values(choice_figures(hypotheses, references, log_odds))


def choice_figures(hypotheses: Sequence[str], references: Sequence[str],
                   log_odds: Sequence[float] = ()) -> dict[str, Figure]:
    same_length(hypotheses, references)
    answers = [_answer_key(reference) for reference in references]
    right = np.array([_answer_key(hypothesis) == answer
                      for hypothesis, answer in zip(hypotheses, answers, strict=True)], dtype=np.float64)
    members = np.array([[answer == kind for kind in dict.fromkeys(answers)] for answer in answers], dtype=np.float64)

    def unweighted(counts: np.ndarray) -> np.ndarray:
        seen = counts @ members  # [R, answers]; a resample may miss an answer
        with np.errstate(invalid="ignore"):
            return np.nanmean(counts @ (members * right[:, None]) / seen, axis=1)

    figures = {"accuracy": ratio(right.tolist()), "unweighted_accuracy": Figure(len(answers), unweighted)}
    if len(log_odds):
        figures["eer"] = _eer_figure(log_odds, [answer == "yes" for answer in answers])
    return figures


def _answer_key(text: str) -> str:
    """What two equal answers have in common. Without its signs "+" would equal "-"."""
    return normalize(text, "basic") or nfc(text).strip()


def equal_error_rate(scores: Sequence[float], is_target: Sequence[bool]) -> float:
    """The error rate at the threshold where misses and false alarms are equally frequent.

    Between two thresholds both rates are taken to change linearly, as on the ROC curve.

    Args:
        scores: higher where a target is more likely (any scale).
        is_target: the truth, at least one of each kind.

    Raises:
        ValueError: lengths differ, or only one kind is there.
    """
    return _eer_figure(scores, is_target).value


def _eer_figure(scores: Sequence[float], is_target: Sequence[bool]) -> Figure:
    same_length(scores, is_target)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    ranked, truth = np.asarray(scores, dtype=np.float64)[order], np.asarray(is_target, dtype=bool)[order]
    if truth.all() or not truth.any():
        raise ValueError("equal_error_rate: needs targets and others, found one kind alone")
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # equal scores share a threshold

    def of(counts: np.ndarray) -> np.ndarray:
        taken, rows = counts[:, order], np.arange(len(counts))
        with np.errstate(invalid="ignore"):
            alarms, hits = (np.pad(np.cumsum(taken * kind, 1)[:, ends], ((0, 0), (1, 0))) / (taken @ kind)[:, None]
                            for kind in (~truth, truth))
            gaps = 1 - hits - alarms  # misses − false alarms, from 1 down to −1
            after = np.maximum(1, np.argmax(gaps <= 0, axis=1))
            before, behind = gaps[rows, after - 1], gaps[rows, after]
            low, high = alarms[rows, after - 1], alarms[rows, after]
            return low + before / (before - behind) * (high - low)

    return Figure(len(ranked), of)


def bleu_scores(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "") -> dict[str, float]:
    """Corpus BLEU and chrF by sacrebleu, both 0 … 100.

    Args:
        tokenize: sacrebleu's tokenizer; default: by the references' script.
    """
    return values(bleu_figures(hypotheses, references, tokenize)[0])


def bleu_figures(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "",
                 ) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures, and of each sacrebleu's signature and, for BLEU, why it splits words so."""
    same_length(hypotheses, references)
    said, meant = ([nfc(text) for text in side] for side in (hypotheses, references))
    bleu, reason = (BLEU(tokenize=tokenize), "as asked for") if tokenize else _bleu_for(meant)
    chrf = CHRF()
    figures = {"bleu": _sacrebleu_figure(bleu, said, meant), "chrf": _sacrebleu_figure(chrf, said, meant)}
    return figures, {"bleu": f"{bleu.get_signature()} ({reason})", "chrf": str(chrf.get_signature())}


def _bleu_for(references: Sequence[str]) -> tuple[BLEU, str]:
    """BLEU with the tokenizer for the references' script, and why it is that one."""
    name, reason = bleu_tokenizer(references)
    try:
        return BLEU(tokenize=name), reason
    except RuntimeError:  # MeCab is a package of its own
        cure = f"pip install sacrebleu[{name.removesuffix('-mecab')}]"
        return BLEU(tokenize="char"), f"{reason}; characters, because {name} is not here: {cure}"


def _sacrebleu_figure(metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]) -> Figure:
    """sacrebleu's own per-sentence counts, summed and finished by sacrebleu."""
    counted = np.array(metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=np.float64)

    def of(counts: np.ndarray) -> np.ndarray:
        sums = np.rint(counts @ counted).astype(int).tolist()
        return np.array([metric._compute_score_from_stats(row).score for row in sums])

    return Figure(len(hypotheses), of)


def answer_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Figure]:
    """Free-text answers: exact match with any reference, and ROUGE-L, both after Whisper's basic normalisation."""
    same_length(hypotheses, references, lists=True)
    from aac_metrics.functional import rouge_l  # takes seconds to import

    said = [_answer_key(text) for text in hypotheses]
    meant = [[_answer_key(text) for text in row] for row in references]
    _, rows = rouge_l([words(text) for text in said], [[words(text) or "(none)" for text in row] for row in meant])
    return {"exact_match": ratio([float(text in row) for text, row in zip(said, meant, strict=True)]),
            "rouge_l": ratio(rows["rouge_l"].tolist())}


def caption_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D, ROUGE-L, and what Java's tools give where they are (see captions.py).

    The corpus decides the words' weights (inverse document frequency), so CIDEr-D needs at
    least two samples, and figures of different splits cannot be compared.

    Args:
        references: for each hypothesis its references, one or more.
    """
    same_length(hypotheses, references, lists=True)
    return values(caption_figures(hypotheses, references)[0])


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """The figures over every clip once."""
    return {name: figure.value for name, figure in figures.items()}


def most_frequent(answers: Sequence[Sequence[str]]) -> str:
    """The answer that stands most often in a split."""
    (answer, _), *_ = Counter(text for row in answers for text in row).most_common(1)
    return answer


def same_length(hypotheses: Sequence[object], references: Sequence[object], lists: bool = False) -> None:
    """Raise ValueError unless both are as long, and not empty, and references are of the right kind.

    A text where a list of texts belongs would be taken for a list of letters, and scored.

    Args:
        lists: each reference is a list of texts, not one text.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise ValueError("expected lists of texts, found one text")
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references; "
                         "expected as many of each, and at least one")
    for place, row in enumerate(references):
        if lists and (isinstance(row, str) or not row):
            raise ValueError(f"reference {place} is {row!r:.80}; expected a list of one or more texts")
        if not lists and isinstance(row, list | tuple):
            raise ValueError(f"reference {place} is {row!r:.80}; expected one text")
