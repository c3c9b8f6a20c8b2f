"""The order of samples: a pure function that no number of ranks, workers or restarts changes."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listen_dist.data.loader import _StepSampler
from listen_dist.data.schedule import (
    GROUP,
    Mixture,
    SampleRef,
    SetOrder,
    TokenCost,
    costs_of,
    cut_by_budget,
    plan_batches,
    plan_once,
)
from listen_dist.structures import LoaderState

pytestmark = pytest.mark.timeout(120)

COST = TokenCost(fixed=5, audio_tokens_per_second=10.0)


@dataclass(frozen=True)
class PlainTable:
    seconds: np.ndarray
    text_chars: np.ndarray
    tasks: np.ndarray


@dataclass(frozen=True)
class PlainShard:
    samples: int


@dataclass(frozen=True)
class PlainIndex:
    """What the schedule knows of a set, without files."""

    counts: tuple[int, ...]
    seed: int = 0
    tables: dict[int, PlainTable] = field(default_factory=dict, compare=False)

    @cached_property
    def shards(self) -> list[PlainShard]:
        return [PlainShard(count) for count in self.counts]

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def shard_table(self, shard: int) -> PlainTable:
        random = np.random.default_rng([self.seed, shard])
        count = self.counts[shard]
        return self.tables.setdefault(shard, PlainTable(
            random.uniform(0.3, 12, count), random.integers(1, 200, count), random.choice(["asr", "caption"], count)))


def index_of(*counts: int, seed: int = 0) -> Any:
    return PlainIndex(counts, seed)


def mixture(seed: int = 3) -> Mixture:
    return Mixture([index_of(7, 5, 9), index_of(4, 6, seed=1), index_of(11, seed=2)], [3, 1, 0.5], seed)


def plan(start: LoaderState = LoaderState(), seed: int = 3) -> Any:  # noqa: B008
    return plan_batches(mixture(seed), COST, budget=300, window=20, seed=seed, start=start)


counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=3 * GROUP + 1)


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, st.integers(0, 2**40))
def test_each_epoch_has_every_sample_once(counts: list[int], seed: int) -> None:
    index = index_of(*counts)
    order = SetOrder(index, seed)
    everything = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    epochs = [[order.at(epoch * index.samples + i) for i in range(index.samples)] for epoch in range(2)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    if index.samples > 9:
        assert epochs[0] != epochs[1] and epochs[0] != everything
    again = SetOrder(index, seed)
    places = np.random.default_rng(0).permutation(2 * index.samples)[:20].tolist()
    assert [again.at(place) for place in places] == [sum(epochs, [])[place] for place in places]


def test_a_group_mixes_the_samples_of_its_shards_only() -> None:
    order = SetOrder(index_of(*[4] * (2 * GROUP)), 1)
    first = {order.at(i)[0] for i in range(4 * GROUP)}
    second = {order.at(i)[0] for i in range(4 * GROUP, 8 * GROUP)}
    assert len(first) == len(second) == GROUP and not first & second


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=6), st.integers(0, 10**6), st.integers(1, 60))
def test_shares_hold_over_any_stretch(weights: list[float], start: int, size: int) -> None:
    mix = Mixture([index_of(5, seed=i) for i in range(len(weights))], weights, 0)
    drawn = [mix.drawn(n) for n in range(start, start + size + 1)]
    assert [int(counts.sum()) for counts in drawn] == list(range(start, start + size + 1))
    # One sample more takes one from one set and puts none back, or samples would come twice.
    assert all((after - before).min() >= 0 for before, after in itertools.pairwise(drawn))
    share = np.array(weights) / sum(weights)
    slack = 0.5 + share * len(weights) / 2
    assert (abs(drawn[0] - share * start) <= slack + 1e-6).all()
    assert (abs(drawn[-1] - drawn[0] - share * size) <= 2 * slack + 1e-6).all()


@pytest.mark.parametrize("size", [1, 3, 20])
def test_windows_give_each_set_in_its_order_without_gap(size: int) -> None:
    mix = mixture()
    windows = [mix.window(number, size) for number in range(400 // size)]
    assert all(len(window) == size for window in windows)
    flat = [ref for window in windows for ref in window]
    for number, order in enumerate(mix.sets):
        mine = [(ref.shard, ref.row) for ref in flat if ref.set == number]
        assert mine == [order.at(i) for i in range(len(mine))]


def test_two_plans_are_the_same_and_another_seed_is_not() -> None:
    first, second, other = (list(itertools.islice(plan(seed=seed), 60)) for seed in (3, 3, 4))
    assert first == second and first != other


def test_batches_keep_the_budget_and_hold_each_window_once() -> None:
    mix = mixture()
    indexes = [order.index for order in mix.sets]
    by_window: dict[int, list[SampleRef]] = {}
    before = LoaderState()
    for refs, state in itertools.islice(plan(), 120):
        costs = costs_of(refs, indexes, COST)
        assert len(refs) == 1 or costs.max() * len(refs) <= 300
        by_window.setdefault(before.window, []).extend(refs)
        assert state.samples == before.samples + len(refs)
        before = state
    by_window.pop(before.window, None)  # perhaps unfinished
    assert len(by_window) > 5
    for number, refs in by_window.items():
        assert Counter(refs) == Counter(mix.window(number, 20))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1, 400), min_size=1, max_size=40), st.booleans())
def test_cuts_keep_order_and_budget(costs: list[float], descending: bool) -> None:
    array = np.array(costs)
    order = np.argsort(-array if descending else array).tolist()
    batches = cut_by_budget(array, order, 300)
    assert sum(batches, []) == order
    for batch, after in itertools.zip_longest(batches, batches[1:]):
        assert len(batch) == 1 or array[batch].max() * len(batch) <= 300
        if after:  # the next sample would not have fitted
            assert max(array[batch].max(), array[after[0]]) * (len(batch) + 1) > 300


def test_the_plan_goes_on_identically_from_any_state() -> None:
    whole = list(itertools.islice(plan(), 80))
    for place in range(0, 60, 7):
        rest = list(itertools.islice(plan(start=whole[place][1]), 15))
        assert rest == whole[place + 1 : place + 16]


@pytest.mark.parametrize("per_step", [1, 2, 3, 4, 6])
def test_any_number_of_ranks_deals_out_the_same_batches(per_step: int) -> None:
    alone = [refs for refs, _ in itertools.islice(plan(), 10 * per_step)]
    for world in (1, 2, 3):
        samplers = [_StepSampler(plan(), per_step, rank, world) for rank in range(world)]
        streams = [iter(sampler) for sampler in samplers]
        for step in range(10):
            rounds = [[next(stream) for _ in range(sampler.rounds)]
                      for stream, sampler in zip(streams, samplers, strict=True)]
            dealt = [refs for one_round in zip(*rounds, strict=True) for refs in one_round if refs]
            assert dealt == alone[step * per_step : (step + 1) * per_step]
            states = {sampler.states.popleft() for sampler in samplers}
            assert len(states) == 1


@pytest.mark.parametrize("limit", [0, 1, 13, 500])
def test_plan_once_covers_every_sample_once(limit: int) -> None:
    index = index_of(7, 5, 9)
    everything = [SampleRef(0, shard, row) for shard, count in enumerate((7, 5, 9)) for row in range(count)]
    expected = {0: everything, 1: everything[:1], 500: everything}.get(limit) or [
        everything[21 * i // 13] for i in range(13)]
    batches = plan_once(index, COST, 300, limit)
    refs = sum(batches, [])
    assert sorted(refs, key=lambda r: (r.shard, r.row)) == expected
    for batch in batches:
        costs = costs_of(batch, [index], COST)
        assert len(batch) == 1 or costs.max() * len(batch) <= 300
        # A one-word answer need not wait for a transcript.
        assert len({str(index.shard_table(ref.shard).tasks[ref.row]) for ref in batch}) == 1


def test_epochs_passed() -> None:
    mix = Mixture([index_of(10), index_of(20, seed=1)], [1, 1], 0)
    assert mix.epochs(40) == [2.0, 1.0]
