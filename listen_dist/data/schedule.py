"""Which samples, in which batches, in which order. Pure functions; no clock, no rank, no audio.

The plan of training is made in three steps, each a function of (indexes, seed):

1. `SetOrder`: one set's samples as an endless stream. In each epoch the shards are
   permuted, and the samples of every GROUP consecutive shards are permuted together.
2. `Mixture`: sets interleaved by weight. After n samples every set has given its share
   of n, rounded; so task shares hold over any stretch, and position n is found at once.
3. `plan_batches`: `window` consecutive samples of the mixture are sorted by length, cut
   into batches by a token budget, and the batches are shuffled.

Ranks deal the batches out among themselves afterwards (see loader.py), so the order does
not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from listen_dist.data.shards import ShardIndex
from listen_dist.dist import derived_seed
from listen_dist.structures import LoaderState

GROUP = 16
"""Shards whose samples are permuted together."""


@dataclass(frozen=True)
class SampleRef:
    """A sample by place: set, shard within the set, row within the shard."""

    set: int
    shard: int
    row: int


@dataclass(frozen=True)
class TokenCost:
    """How many LLM tokens a sample takes, estimated from what the index knows."""

    fixed: int
    """Prompts, BOS and the text before the audio."""
    audio_tokens_per_second: float
    characters_per_token: float = 3.5

    def __call__(self, seconds: np.ndarray, characters: np.ndarray) -> np.ndarray:
        """Tokens (float64) of samples with so many seconds of audio and characters of text."""
        return self.fixed + np.ceil(seconds * self.audio_tokens_per_second) + characters / self.characters_per_token


class SetOrder:
    """One set's endless stream of (shard, row)."""

    def __init__(self, index: ShardIndex, seed: int) -> None:
        self.index = index
        self._seed = seed
        self._counts = np.array([shard.samples for shard in index.shards])
        self._epoch = lru_cache(maxsize=2)(self._shard_order)
        self._group = lru_cache(maxsize=2)(self._group_order)

    def at(self, position: int) -> tuple[int, int]:
        """The sample at a position of the stream; positions go on over epochs without end."""
        epoch, within = divmod(position, self.index.samples)
        _, group_ends = self._epoch(epoch)
        group = int(np.searchsorted(group_ends, within, side="right"))
        start = int(group_ends[group - 1]) if group else 0
        shards, rows = self._group(epoch, group)
        return int(shards[within - start]), int(rows[within - start])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permuted shard numbers of an epoch, and the running sample count at each group's end."""
        order = np.random.default_rng(derived_seed("shards", self._seed, epoch)).permutation(len(self._counts))
        ends = np.cumsum(self._counts[order])
        return order, np.append(ends[GROUP - 1 : -1 : GROUP], ends[-1])

    def _group_order(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of every sample of a group, permuted."""
        shards = self._epoch(epoch)[0][group * GROUP : (group + 1) * GROUP]
        shard_of = np.repeat(shards, self._counts[shards])
        row_of = np.concatenate([np.arange(self._counts[shard]) for shard in shards])
        order = np.random.default_rng(derived_seed("rows", self._seed, epoch, group)).permutation(len(row_of))
        return shard_of[order], row_of[order]


class Mixture:
    """Several sets interleaved by weight."""

    def __init__(self, indexes: Sequence[ShardIndex], weights: Sequence[float], seed: int) -> None:
        self.sets = [SetOrder(index, derived_seed("set", seed, i)) for i, index in enumerate(indexes)]
        shares = np.array(weights, dtype=np.float64)
        self._shares = shares / shares.sum()

    def drawn(self, samples: int) -> np.ndarray:
        """Samples taken from each set among the first `samples`.

        Webster's apportionment: a set's next sample is due when its exact share passes a half.
        Unlike rounding by largest remainders, no set's number ever falls as `samples` grows.
        """
        # Begin a little below and add one by one: then samples due at once come in one order for all `samples`.
        counts = np.floor(self._shares * max(0.0, samples - 1.5 * len(self._shares)) + 0.5).astype(np.int64)
        for _ in range(samples - int(counts.sum())):
            counts[np.argmin((counts + 0.5) / self._shares)] += 1
        return counts

    def window(self, number: int, size: int) -> list[SampleRef]:
        """The samples of window `number`, each set's in its stream's order."""
        first, last = self.drawn(number * size), self.drawn((number + 1) * size)
        return [SampleRef(i, *order.at(position)) for i, order in enumerate(self.sets)
                for position in range(int(first[i]), int(last[i]))]

    def epochs(self, samples: int) -> list[float]:
        """How often each set has been gone through after so many samples."""
        return [float(n) / order.index.samples for n, order in zip(self.drawn(samples), self.sets, strict=True)]


def costs_of(refs: Sequence[SampleRef], indexes: Sequence[ShardIndex], cost: TokenCost) -> np.ndarray:
    """Estimated LLM tokens [refs] of each sample."""
    seconds, characters = np.empty(len(refs)), np.empty(len(refs))
    for i, ref in enumerate(refs):
        table = indexes[ref.set].shard_table(ref.shard)
        seconds[i], characters[i] = table.seconds[ref.row], table.text_chars[ref.row]
    return cost(seconds, characters)


def cut_by_budget(costs: np.ndarray, order: Sequence[int], budget: float) -> list[list[int]]:
    """Cut a sequence of samples into batches of at most `budget` tokens, padding counted.

    `order` must go from short to long or back; a sample above the budget is alone.
    """
    batches: list[list[int]] = []
    longest = 0.0
    for i in order:
        longest = max(longest, costs[i]) if batches else costs[i]
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = costs[i]
    return batches


def plan_batches(mixture: Mixture, cost: TokenCost, budget: float, window: int, seed: int,
                 start: LoaderState) -> Iterator[tuple[list[SampleRef], LoaderState]]:
    """The endless sequence of micro-batches from `start` on, each with the state behind it."""
    indexes = [order.index for order in mixture.sets]
    number, offset, samples = start.window, start.offset, start.samples
    while True:
        refs = mixture.window(number, window)
        random = np.random.default_rng(derived_seed("batches", seed, number))
        costs = costs_of(refs, indexes, cost)
        shuffled = random.permutation(len(refs))
        by_length = shuffled[np.argsort(costs[shuffled], kind="stable")]
        batches = cut_by_budget(costs, by_length.tolist(), budget)
        for place in random.permutation(len(batches))[offset:]:
            batch = [refs[i] for i in batches[place]]
            offset, samples = offset + 1, samples + len(batch)
            done = offset == len(batches)
            yield batch, LoaderState(number + done, 0 if done else offset, samples)
        number, offset = number + 1, 0


def plan_once(index: ShardIndex, cost: TokenCost, budget: float, limit: int = 0, done: Set[str] = frozenset(),
              ) -> list[list[SampleRef]]:
    """Every sample of one set exactly once (or `limit` evenly spread) but those that are done, longest first.

    Each batch holds one task, so that a one-word answer need not wait for a transcript.
    """
    refs = [SampleRef(0, shard, row) for shard, entry in enumerate(index.shards) for row in range(entry.samples)]
    if 0 < limit < len(refs):
        refs = [refs[i * len(refs) // limit] for i in range(limit)]  # a set may be sorted by answer
    if done:
        refs = [ref for ref in refs if index.shard_table(ref.shard).ids[ref.row] not in done]
    if not refs:
        return []
    costs = costs_of(refs, [index], cost)
    tasks = np.array([index.shard_table(ref.shard).tasks[ref.row] for ref in refs])
    by_length = np.argsort(-costs, kind="stable")
    return [[refs[i] for i in batch] for task in np.unique(tasks)
            for batch in cut_by_budget(costs, by_length[tasks[by_length] == task].tolist(), budget)]
