"""The order of samples: a pure function that no number of ranks, workers or restarts changes."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listen_dist.data.loader import _StepSampler
from listen_dist.data.mixture import GROUP, Mixture, SampleRef, SetOrder
from listen_dist.data.schedule import (
    TokenCost,
    costs_of,
    cut_by_budget,
    cut_evenly,
    plan_batches,
    plan_once,
    spread,
)
from listen_dist.data.shard_members import ShardError
from listen_dist.schema import SetConfig
from listen_dist.structures import LoaderState

pytestmark = pytest.mark.timeout(120)

COST = TokenCost(fixed=5, audio_tokens_per_second=10.0)


@dataclass(frozen=True)
class PlainTable:
    seconds: np.ndarray
    text_chars: np.ndarray
    tasks: np.ndarray


@dataclass(frozen=True)
class PlainIndex:
    """What the schedule knows of a set, without files."""

    counts: np.ndarray
    seed: int = 0
    tables: dict[int, PlainTable] = field(default_factory=dict, compare=False)

    @property
    def folder(self) -> Path:
        return Path(f"/data/set{self.seed}/train")

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def tasks(self) -> dict[str, int]:
        tables = [self.shard_table(shard) for shard in range(len(self.counts))]
        return dict(sorted(Counter(task for table in tables for task in table.tasks).items()))

    def shard_table(self, shard: int) -> PlainTable:
        random = np.random.default_rng([self.seed, shard])
        count = self.counts[shard]
        return self.tables.setdefault(shard, PlainTable(
            random.uniform(0.3, 12, count), random.integers(1, 200, count), random.choice(["asr", "caption"], count)))


def index_of(*counts: int, seed: int = 0) -> Any:
    return PlainIndex(np.array(counts), seed)


def weighted(*weights: float) -> list[SetConfig]:
    return [SetConfig("set", weight) for weight in weights]


def mixture(seed: int = 3) -> Mixture:
    return Mixture([index_of(7, 5, 9), index_of(4, 6, seed=1), index_of(11, seed=2)], weighted(3, 1, 0.5), seed)


def plan(start: LoaderState = LoaderState(), seed: int = 3) -> Any:  # noqa: B008
    return plan_batches(mixture(seed), COST, budget=300, window=20, seed=seed, start=start)


counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=3 * GROUP + 1)


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, st.integers(0, 2**40))
def test_each_epoch_has_every_sample_once(counts: list[int], seed: int) -> None:
    index = index_of(*counts)
    order = SetOrder(index, seed)
    everything = [[(shard, row, epoch) for shard, count in enumerate(counts) for row in range(count)]
                  for epoch in range(2)]
    epochs = [[order.at(epoch * index.samples + i) for i in range(index.samples)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == everything
    if index.samples > 9:
        places = [[place[:2] for place in epoch] for epoch in (*epochs, everything[0])]
        assert places[0] != places[1] and places[0] != places[2]
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
    mix = Mixture([index_of(5, seed=i) for i in range(len(weights))], weighted(*weights), 0)
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
        mine = [(ref.shard, ref.row, ref.epoch) for ref in flat if ref.set == number]
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


def test_repeats_are_told() -> None:
    mix = Mixture([index_of(10), index_of(20, seed=1)], weighted(1, 1), 0)
    assert mix.epochs(40) == {"set0_train": 2.0, "set1_train": 1.0}
    assert mix.describe()[0] == ("set0_train: 10 samples, 50.0 % of what is drawn, gone through 2.0 times while the "
                                 "slowest set is gone through once")
    assert Mixture([index_of(10)] * 2, weighted(1, 1), 0).labels == ["0_set0_train", "1_set0_train"]


@pytest.mark.parametrize(("temperature", "weights", "expected"), [
    (None, (1, 3), (1 / 4, 3 / 4)),
    (1.0, (1, 1), (10 / 1010, 1000 / 1010)),
    (2.0, (1, 1), (1 / 11, 10 / 11)),  # square roots
    (2.0, (5, 1), (5 / 15, 10 / 15)),  # and a weight on top
    (1e9, (1, 1), (1 / 2, 1 / 2)),
])
def test_shares_by_temperature(temperature: float | None, weights: tuple[float, ...],
                               expected: tuple[float, ...]) -> None:
    mix = Mixture([index_of(10), index_of(400, 600, seed=1)], weighted(*weights), 0, temperature)
    assert mix.shares == pytest.approx(expected)
    assert mix.drawn(100_000) == pytest.approx(100_000 * np.array(expected), abs=1)


def test_limits_leave_out_what_they_say() -> None:
    index = index_of(30, 2, 40)
    short = [(shard, row) for shard in range(3) for row in range(int(index.counts[shard]))
             if index.shard_table(shard).seconds[row] <= 4]
    for limits, left in ((SetConfig("set", max_seconds=4), short), (SetConfig("set", max_seconds=4, max_samples=9),
                                                                    short[:9])):
        order = SetOrder(index, 1, limits)
        assert order.samples == len(left) < index.samples
        for epoch in range(2):
            drawn = [order.at(epoch * len(left) + i) for i in range(len(left))]
            assert sorted(drawn) == [(*place, epoch) for place in left]
    of_task = [(shard, row) for shard in range(3) for row, task in enumerate(index.shard_table(shard).tasks)
               if task == "caption"]
    order = SetOrder(index, 1, SetConfig("set", task="caption"))
    assert sorted(order.at(i)[:2] for i in range(order.samples)) == of_task and 10 < len(of_task) < 62
    both = set(of_task) & set(short)
    assert SetOrder(index, 1, SetConfig("set", task="caption", max_seconds=4)).samples == len(both)
    with pytest.raises(ShardError, match="holds no sample of task = 'speech', only of asr, caption"):
        SetOrder(index, 1, SetConfig("set", task="speech"))
    # The share is of what is drawn, so that a limit does not change the mix.
    mix = Mixture([index, index_of(50, seed=1)], [SetConfig("a", 1, max_seconds=4), SetConfig("b", 3)], 0)
    assert mix.drawn(400).tolist() == [100, 300]
    with pytest.raises(ShardError, match=r"no clip is as short as max_seconds = 0\.1"):
        SetOrder(index, 1, SetConfig("set", max_seconds=0.1))


TASK_SECONDS = {"asr": (1, 4), "caption": (5, 30), "language_id": (1.5, 2), "speech_qa": (0.3, 12)}


def real_mixture() -> tuple[Mixture, list[float]]:
    """Four sets of unlike lengths, so that batches of neighbours in length are mostly of one set."""
    indexes = []
    for i, (low, high) in enumerate(TASK_SECONDS.values()):
        index = index_of(*[100] * 20, seed=i)
        for shard in range(20):
            random = np.random.default_rng([i, shard])
            index.tables[shard] = PlainTable(random.uniform(low, high, 100), random.integers(1, 60, 100), np.array([]))
        indexes.append(index)
    weights = [4.0, 1, 2, 1]
    return Mixture(indexes, weighted(*weights), 0), weights


@pytest.mark.parametrize("window", [256, 1024])
def test_task_counts_stay_within_one_batch_over_any_1000_samples(window: int) -> None:
    mix, weights = real_mixture()
    batches = [refs for refs, _ in itertools.islice(plan_batches(mix, COST, 1024, window, 3, LoaderState()), 300)]
    counts = np.stack([np.bincount([ref.set for ref in refs], minlength=4) for refs in batches])
    done = np.concatenate([np.zeros((1, 4), int), counts.cumsum(0)])
    total, share = done.sum(1), np.array(weights) / sum(weights)
    assert total[-1] > 3000
    worst = 0.0
    for start in range(len(done)):
        end = int(np.searchsorted(total, total[start] + 1000))
        if end < len(done):
            given = done[end] - done[start]
            worst = max(worst, float(abs(given - share * given.sum()).max()))
    assert worst <= counts.sum(1).max()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=30),
       st.integers(0, 99))
def test_spreading_is_an_order(rows: list[list[int]], seed: int) -> None:
    order = spread(np.array(rows), np.random.default_rng(seed))
    assert sorted(order) == list(range(len(rows)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 200), st.floats(200, 3000))
def test_even_batches_are_as_few_and_within_the_budget(seed: int, count: int, budget: float) -> None:
    costs = np.random.default_rng(seed).uniform(5, 150, count)
    order = np.argsort(costs).tolist()
    few, even = cut_by_budget(costs, order, budget), cut_evenly(costs, order, budget)
    assert sum(even, []) == order and len(even) == len(few)
    assert all(len(batch) * costs[batch].max() <= budget for batch in even)
    assert max(costs[batch].sum() for batch in even) <= max(costs[batch].sum() for batch in few) + 1e-6


def test_batches_hold_little_padding_and_like_numbers_of_tokens() -> None:
    mix, _ = real_mixture()
    batches = [refs for refs, _ in itertools.islice(plan_batches(mix, COST, 2048, 2048, 3, LoaderState()), 160)]
    costs = [costs_of(refs, [order.index for order in mix.sets], COST) for refs in batches]
    real = np.array([cost.sum() for cost in costs])
    padded = sum(len(cost) * cost.max() for cost in costs)
    assert 1 - real.sum() / padded <= 0.05
    for ranks in (2, 4, 8):
        steps = real.reshape(-1, ranks)
        assert (steps.max(1) / steps.mean(1) - 1).mean() <= 0.05
