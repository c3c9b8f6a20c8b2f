"""How sure a figure is: bootstrap intervals over clips, and the paired test between two runs.

A figure is kept as a function of how often each clip is counted, so that a resample costs a product of
matrices instead of a second scoring. Everything is seeded: the same predictions give the same intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 0
_CELLS = 4_000_000
"""Counts held at once: a large set is resampled in several goes."""


@dataclass(frozen=True)
class Figure:
    """A metric of a set of clips."""

    clips: int
    of: Callable[[np.ndarray], np.ndarray]
    """From counts [R, clips], how often each clip is taken, to R values; NaN where a draw allows none."""
    each: tuple[float, ...] = ()
    """Every clip's own value, where the figure is a sum over a sum; NaN or infinite where nothing is below."""

    @property
    def value(self) -> float:
        """The figure over every clip once."""
        return float(self.of(np.ones((1, self.clips)))[0])


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same clips."""

    first: float
    second: float
    low: float
    high: float
    """95 % interval of second − first."""
    p: float
    """How often resampling alone gives a difference as large, if the runs were equally good (two-sided)."""


def ratio(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Figure:
    """Sum over sum of the clips' own figures; without denominators their mean."""
    above = np.asarray(numerators, dtype=np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, dtype=np.float64)

    def of(counts: np.ndarray) -> np.ndarray:
        size = counts @ below
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(size > 0, counts @ above / size, np.nan)

    with np.errstate(divide="ignore", invalid="ignore"):
        return Figure(len(above), of, tuple((above / below).tolist()))


def total(amounts: Sequence[float]) -> Figure:
    """Sum of the clips' own figures."""
    values = np.asarray(amounts, dtype=np.float64)
    return Figure(len(values), lambda counts: counts @ values)


def interval(figure: Figure) -> tuple[float, float]:
    """95 % percentile interval over resampled clips."""
    low, high = np.nanpercentile(_resampled(figure), [2.5, 97.5])
    return float(low), float(high)


def compare(first: Figure, second: Figure) -> Comparison:
    """Paired bootstrap: both runs on the same resampled clips.

    Raises:
        ValueError: the runs have different numbers of clips.
    """
    if first.clips != second.clips:
        raise ValueError(f"paired test of {first.clips} clips against {second.clips}")
    differences = _resampled(second) - _resampled(first)
    differences = differences[~np.isnan(differences)]
    found = second.value - first.value
    low, high = np.percentile(differences, [2.5, 97.5])
    # Under the hypothesis of no difference the resampled ones spread about zero instead of `found`.
    # The slack forgives rounding: where all draws equal `found`, they are as large, not larger.
    as_large = np.abs(differences - found) >= abs(found) - 1e-12
    p = (1 + int(as_large.sum())) / (1 + len(differences))
    return Comparison(first.value, second.value, float(low), float(high), p)


def _resampled(figure: Figure) -> np.ndarray:
    return np.concatenate([figure.of(counts) for counts in _draws(figure.clips)])


def _draws(clips: int) -> Iterator[np.ndarray]:
    """The same counts for every figure over as many clips, RESAMPLES of them in goes of bounded size."""
    random = np.random.default_rng(SEED)
    at_once = max(1, min(RESAMPLES, _CELLS // clips))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        yield random.multinomial(clips, np.full(clips, 1 / clips), size=size).astype(np.float64)
