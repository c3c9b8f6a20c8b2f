"""Which samples, in which batches, in which order. Pure functions; no clock, no rank, no audio.

The plan of training is made in three steps, each a function of (indexes, seed):

1. `Mixture` (mixture.py): the endless sequence of samples; every set gives its share of any stretch.
2. `cut_evenly`: `window` consecutive samples are sorted by length and cut into as few batches as the
   token budget allows, all of nearly the same number of tokens.
3. `spread`: the batches of a window are put in an order in which every stretch holds nearly each set's share.

Ranks deal the batches out among themselves afterwards (see loader.py), so the order does
not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from listen_dist.data.mixture import Mixture, SampleRef
from listen_dist.data.shards import ShardIndex
from listen_dist.dist import derived_seed
from listen_dist.structures import LoaderState

EVENNESS = 1 / 200
"""How near the least even batch size is looked for, as a share of the budget."""


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a set's texts (instruction and target) by their characters: a straight line."""

    base: float = 0.0
    per_character: float = 1 / 3.5


@dataclass(frozen=True)
class TokenCost:
    """How many LLM tokens a sample takes, estimated from what the index knows."""

    fixed: int
    """Prompts, BOS, the text before the audio, what follows it besides the instruction, and EOS."""
    audio_tokens_per_second: float
    text: tuple[TextTokens, ...] = ()
    """For each set, as text_cost.py learns it; a rule of thumb for sets beyond."""

    def __call__(self, seconds: np.ndarray, characters: np.ndarray, sets: Sequence[int]) -> np.ndarray:
        """Tokens (float64) of samples with so many seconds of audio and characters of text, of these sets."""
        lines = [self.text[place] if place < len(self.text) else TextTokens() for place in range(max(sets) + 1)]
        base, slope = np.array([(line.base, line.per_character) for line in lines])[list(sets)].T
        return self.fixed + np.ceil(seconds * self.audio_tokens_per_second) + base + characters * slope


def costs_of(refs: Sequence[SampleRef], indexes: Sequence[ShardIndex], cost: TokenCost) -> np.ndarray:
    """Estimated LLM tokens [refs] of each sample."""
    seconds, characters = np.empty(len(refs)), np.empty(len(refs))
    tables = {place: indexes[place[0]].shard_table(place[1]) for place in {(ref.set, ref.shard) for ref in refs}}
    for i, ref in enumerate(refs):
        table = tables[ref.set, ref.shard]
        seconds[i], characters[i] = table.seconds[ref.row], table.text_chars[ref.row]
    return cost(seconds, characters, [ref.set for ref in refs])


def cut_by_budget(costs: np.ndarray, order: Sequence[int], budget: float, real: float = math.inf) -> list[list[int]]:
    """Cut a sequence of samples into batches of at most `budget` tokens with padding and `real` without.

    `order` must go from short to long or back; a sample above the budget is alone.
    """
    batches: list[list[int]] = []
    longest = total = 0.0
    for i, cost in zip(order, costs[list(order)].tolist(), strict=True):
        widest = max(longest, cost)
        if batches and (len(batches[-1]) + 1) * widest <= budget and total + cost <= real:
            batches[-1].append(i)
            longest, total = widest, total + cost
        else:
            batches.append([i])
            longest = total = cost
    return batches


def cut_evenly(costs: np.ndarray, order: Sequence[int], budget: float) -> list[list[int]]:
    """Cut like `cut_by_budget`, into no more batches, but with nearly equal numbers of tokens.

    Ranks that get batches of one step then have nearly the same work, and no window ends in a scrap.
    """
    best = cut_by_budget(costs, order, budget)
    low, high = float(costs.sum()) / len(best), float(budget)
    while high - low > EVENNESS * budget:
        middle = (low + high) / 2
        batches = cut_by_budget(costs, order, budget, middle)
        if len(batches) <= len(best):
            best, high = batches, middle
        else:
            low = middle
    return best


def spread(counts: np.ndarray, random: np.random.Generator) -> list[int]:
    """An order of batches in which every stretch holds nearly its share of each set.

    Greedy: next comes the batch that brings what has been given closest to the shares of the whole.
    Batches hold clips of like length and so often of one set; in random order sets would come in clumps.

    Args:
        counts: int [batches, sets], samples of each set in each batch.
        random: breaks ties.
    """
    share = counts.sum(0) / counts.sum()
    excess = counts - counts.sum(1, keepdims=True) * share  # [batches, sets]
    left = random.permutation(len(counts)).tolist()
    given = np.zeros(counts.shape[1])
    order = []
    while left:
        place = int(np.argmin(((given + excess[left]) ** 2).sum(1)))
        given += excess[left[place]]
        order.append(left.pop(place))
    return order


def plan_batches(mixture: Mixture, cost: TokenCost, budget: float, window: int, seed: int,
                 start: LoaderState) -> Iterator[tuple[list[SampleRef], LoaderState]]:
    """The endless sequence of micro-batches from `start` on, each with the state behind it."""
    number, offset, samples = start.window, start.offset, start.samples
    while True:
        batches = plan_window(mixture, cost, budget, window, seed, number)
        for batch in batches[offset:]:
            offset, samples = offset + 1, samples + len(batch)
            done = offset == len(batches)
            yield batch, LoaderState(number + done, 0 if done else offset, samples)
        number, offset = number + 1, 0


def plan_window(mixture: Mixture, cost: TokenCost, budget: float, window: int, seed: int,
                number: int) -> list[list[SampleRef]]:
    """The micro-batches of window `number` in their order."""
    refs = mixture.window(number, window)
    random = np.random.default_rng(derived_seed("batches", seed, number))
    costs = costs_of(refs, [order.index for order in mixture.sets], cost)
    shuffled = random.permutation(len(refs))
    by_length = shuffled[np.argsort(costs[shuffled], kind="stable")]
    batches = cut_evenly(costs, by_length.tolist(), budget)
    sets = np.array([ref.set for ref in refs])
    counts = np.stack([np.bincount(sets[batch], minlength=len(mixture.sets)) for batch in batches])
    return [[refs[i] for i in batches[place]] for place in spread(counts, random)]


def plan_once(index: ShardIndex, cost: TokenCost, budget: float, limit: int = 0, done: Set[str] = frozenset(),
              ) -> list[list[SampleRef]]:
    """Every sample of one set exactly once (or `limit` evenly spread) but those that are done, longest first.

    Each batch holds one task, so that a one-word answer need not wait for a transcript.
    """
    refs = [SampleRef(0, shard, row) for shard, count in enumerate(index.counts.tolist()) for row in range(count)]
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
