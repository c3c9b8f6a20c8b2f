"""Which sample comes when: one set's endless stream, and several sets mixed. Pure functions, random access.

1. `SetOrder`: one set's samples as an endless stream. In each epoch the shards are
   permuted, and the samples of every GROUP consecutive shards are permuted together.
2. `Mixture`: sets interleaved by their shares. After n samples every set has given its share
   of n, rounded; so shares hold over any stretch, and position n is found at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import ShardIndex
from listen_dist.dist import derived_seed
from listen_dist.schema import SetConfig

GROUP = 16
"""Shards whose samples are permuted together."""


@dataclass(frozen=True)
class SampleRef:
    """A sample by place: set, shard within the set, row within the shard; and for which time it comes."""

    set: int
    shard: int
    row: int
    epoch: int = 0
    """How often the set had been gone through before; augmentation differs by it."""


class SetOrder:
    """One set's endless stream of samples.

    Args:
        index: the set.
        seed: of the order.
        limits: its `max_seconds`, `max_samples` and `task` leave samples out.

    Raises:
        ShardError: the limits leave nothing.
    """

    def __init__(self, index: ShardIndex, seed: int, limits: SetConfig | None = None) -> None:
        self.index = index
        self._seed = seed
        self._max_seconds = limits.max_seconds if limits else 0.0
        self._task = limits.task if limits else ""
        self._counts = index.counts
        if self._max_seconds or self._task:  # only the sidecars know how many are left, so all of them are read, once
            self._counts = np.array([len(self._rows(shard)) for shard in range(len(index.counts))])
        if limits and limits.max_samples:
            before = np.cumsum(self._counts) - self._counts
            self._counts = np.clip(limits.max_samples - before, 0, self._counts)
        self.samples = int(self._counts.sum())
        """Samples of one epoch."""
        if not self.samples:
            if self._task not in ("", *index.tasks):
                raise ShardError(f"{index.folder}: holds no sample of task = {self._task!r}, only of "
                                 f"{', '.join(index.tasks)}")
            raise ShardError(f"{index.folder}: no clip is as short as max_seconds = {self._max_seconds:g}; raise it")
        self._epoch = lru_cache(maxsize=2)(self._shard_order)
        self._group = lru_cache(maxsize=2)(self._group_order)

    def at(self, position: int) -> tuple[int, int, int]:
        """Shard, row and epoch at a position of the stream; positions go on over epochs without end."""
        epoch, within = divmod(position, self.samples)
        _, group_ends = self._epoch(epoch)
        group = int(np.searchsorted(group_ends, within, side="right"))
        start = int(group_ends[group - 1]) if group else 0
        shards, rows = self._group(epoch, group)
        return int(shards[within - start]), int(rows[within - start]), epoch

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permuted shard numbers of an epoch, and the running sample count at each group's end."""
        order = np.random.default_rng(derived_seed("shards", self._seed, epoch)).permutation(len(self._counts))
        ends = np.cumsum(self._counts[order])
        return order, np.append(ends[GROUP - 1 : -1 : GROUP], ends[-1])

    def _group_order(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of every sample of a group, permuted."""
        shards = self._epoch(epoch)[0][group * GROUP : (group + 1) * GROUP]
        shard_of = np.repeat(shards, self._counts[shards])
        row_of = np.concatenate([self._rows(int(shard))[: self._counts[shard]] for shard in shards])
        order = np.random.default_rng(derived_seed("rows", self._seed, epoch, group)).permutation(len(row_of))
        return shard_of[order], row_of[order]

    def _rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that are short enough and of the right task."""
        if not (self._max_seconds or self._task):
            return np.arange(self.index.counts[shard])
        table = self.index.shard_table(shard)
        left = table.seconds <= (self._max_seconds or math.inf)
        return np.flatnonzero(left & (table.tasks == self._task) if self._task else left)


class Mixture:
    """Several sets interleaved by share: p ∝ weight · n^(1/T) where a temperature is given, else p ∝ weight.

    Weight and temperature multiply: the temperature sets the shares by size, a weight other than 1 corrects one set.

    Args:
        indexes: the sets.
        sets: weight and limits of each.
        seed: of the order.
        temperature: T. 1 draws in proportion to the sets' sizes n (after limits), a large one from all alike.
    """

    def __init__(self, indexes: Sequence[ShardIndex], sets: Sequence[SetConfig], seed: int,
                 temperature: float | None = None) -> None:
        self.sets = [SetOrder(index, derived_seed("set", seed, i), entry)
                     for i, (index, entry) in enumerate(zip(indexes, sets, strict=True))]
        shares = np.array([entry.weight for entry in sets], dtype=np.float64)
        if temperature:
            shares *= np.array([order.samples for order in self.sets], dtype=np.float64) ** (1 / temperature)
        self.shares = shares / shares.sum()

    def drawn(self, samples: int) -> np.ndarray:
        """Samples taken from each set among the first `samples`.

        Webster's apportionment: a set's next sample is due when its exact share passes a half.
        Unlike rounding by largest remainders, no set's number ever falls as `samples` grows.
        """
        # Begin a little below and add one by one: then samples due at once come in one order for all `samples`.
        counts = np.floor(self.shares * max(0.0, samples - 1.5 * len(self.shares)) + 0.5).astype(np.int64)
        for _ in range(samples - int(counts.sum())):
            counts[np.argmin((counts + 0.5) / self.shares)] += 1
        return counts

    def window(self, number: int, size: int) -> list[SampleRef]:
        """The samples of window `number`, each set's in its stream's order."""
        first, last = self.drawn(number * size), self.drawn((number + 1) * size)
        return [SampleRef(i, *order.at(position)) for i, order in enumerate(self.sets)
                for position in range(int(first[i]), int(last[i]))]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each set has been gone through after so many samples, by `labels`."""
        passes = self.drawn(samples) / np.array([order.samples for order in self.sets])
        return dict(zip(self.labels, passes.tolist(), strict=True))

    @property
    def labels(self) -> list[str]:
        """A short name for each set: the last two parts of its folder, numbered where that is ambiguous."""
        short = ["_".join(str(order.index.folder).rstrip("/").split("/")[-2:]) for order in self.sets]
        return short if len(set(short)) == len(short) else [f"{i}_{name}" for i, name in enumerate(short)]

    def describe(self) -> list[str]:
        """One line a set: its share, and how often it comes again while the slowest set is gone through once."""
        rates = self.shares / np.array([order.samples for order in self.sets])
        return [f"{label}: {order.samples:,} samples, {100 * share:.1f} % of what is drawn, gone through "
                f"{rate / rates.min():.1f} times while the slowest set is gone through once"
                for label, order, share, rate in zip(self.labels, self.sets, self.shares, rates, strict=True)]
