"""Intervals and the paired test, against closed forms and plain resampling."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import norm

from listen_dist.evaluation.bootstrap import Figure, compare, interval, ratio, total
from listen_dist.evaluation.metrics import (
    bleu_figures,
    choice_figures,
    choice_scores,
    equal_error_rate,
    wer_figures,
    wer_scores,
)

pytestmark = pytest.mark.timeout(120)
RANDOM = np.random.default_rng(3)
WORDS = ["cat", "dog", "bird", "house", "tree"]
SAID = [" ".join(RANDOM.choice(WORDS, RANDOM.integers(0, 7))) for _ in range(40)]
MEANT = [" ".join(RANDOM.choice(WORDS, RANDOM.integers(1, 7))) for _ in range(40)]
ANSWERS = [["yes", "no", "maybe"][i] for i in RANDOM.integers(0, 3, 40)]
GUESSES = [["yes", "no", "maybe"][i] for i in RANDOM.integers(0, 3, 40)]
ODDS = RANDOM.normal(size=40).round(1).tolist()


def drawn(counts: np.ndarray, column: list) -> list:
    """The clips of a resample, written out."""
    return [value for value, times in zip(column, counts.astype(int), strict=True) for _ in range(times)]


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=6).astype(float)


def test_a_resample_is_the_metric_of_the_clips_it_draws(counts: np.ndarray) -> None:
    """Word error rates, accuracies, BLEU, chrF and EER, scored anew from the texts that were drawn."""
    wer, choice = wer_figures(SAID, MEANT), choice_figures(GUESSES, ANSWERS, ODDS)
    bleu, _ = bleu_figures(SAID, MEANT)
    for row, draw in enumerate(counts):
        said, meant = drawn(draw, SAID), drawn(draw, MEANT)
        for name, expected in wer_scores(said, meant).items():
            assert wer[name].of(counts)[row] == pytest.approx(expected), name
        guesses, answers, odds = drawn(draw, GUESSES), drawn(draw, ANSWERS), drawn(draw, ODDS)
        for name, expected in choice_scores(guesses, answers).items():
            assert choice[name].of(counts)[row] == pytest.approx(expected), name
        assert choice["eer"].of(counts)[row] == pytest.approx(
            equal_error_rate(odds, [answer == "yes" for answer in answers]))
        assert bleu["bleu"].of(counts)[row] == pytest.approx(BLEU().corpus_score(said, [meant]).score)
        assert bleu["chrf"].of(counts)[row] == pytest.approx(CHRF().corpus_score(said, [meant]).score)


def test_an_interval_of_a_mean_is_the_normal_one_and_repeats() -> None:
    sample = np.random.default_rng(1).normal(5, 2, size=900)
    figure = ratio(sample.tolist())
    low, high = interval(figure)
    wide = norm.ppf(0.975) * sample.std() / np.sqrt(len(sample))
    assert figure.value == pytest.approx(sample.mean())
    assert (low, high) == pytest.approx((sample.mean() - wide, sample.mean() + wide), abs=0.1 * wide)
    assert interval(figure) == (low, high) and interval(ratio([1.0] * 9)) == (1, 1)


def test_a_draw_without_any_denominator_is_left_out() -> None:
    assert interval(ratio([0.0, 3.0], [0.0, 6.0])) == (0.5, 0.5)
    assert total([1.0, 2.0]).value == 3


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.4])
def test_the_paired_p_value_is_that_of_the_paired_z_test(shift: float) -> None:
    random = np.random.default_rng(7)
    first = random.normal(0, 3, size=400)
    second = first + shift + random.normal(0, 1, size=400)  # clips differ far more than runs do
    found = compare(ratio(first.tolist()), ratio(second.tolist()))
    difference = second - first
    z = abs(difference.mean()) / (difference.std() / np.sqrt(400))
    assert found.p == pytest.approx(2 * norm.sf(z), abs=0.04)
    assert found.low < difference.mean() < found.high
    assert (found.low > 0) == (found.p < 0.05)


def test_runs_alike_do_not_differ_and_others_cannot_be_compared() -> None:
    figure = ratio([1.0, 0.0, 1.0])
    same = compare(figure, figure)
    assert (same.p, same.low, same.high) == (1, 0, 0)
    with pytest.raises(ValueError, match="3 clips against 2"):
        compare(figure, ratio([1.0, 0.0]))


def test_a_large_set_takes_bounded_memory_and_time() -> None:
    seen: list[int] = []

    def of(counts: np.ndarray) -> np.ndarray:
        seen.append(counts.size)
        return counts[:, 0]

    started = time.perf_counter()
    interval(Figure(20_000, of))
    assert max(seen) <= 4_000_000 and sum(seen) == 1000 * 20_000 and time.perf_counter() - started < 60
