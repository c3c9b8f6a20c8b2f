"""The numbers of the pool's report against brute force, closed forms and scikit-learn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from listen_dist.evaluation import prompts
from listen_dist.evaluation.figures import labels_of

TASKS = ["asr", "asr", "asr", "caption", "caption", "qa"]
SETS = [(0, 1), (1, 0), (2, 0), (3, 1), (3, 4), (5, 0)]


def choices(weighted: bool = False) -> prompts.Choices:
    return prompts.Choices(TASKS, list(SETS), [(0.3, 0.2)] * len(SETS), pool_size=8, weighted=weighted)


def test_usage_is_the_share_of_clips() -> None:
    table = choices().membership()
    asr = prompts.usage_summary(table[:3])
    assert asr["usage"] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0])
    shares = [3 / 6, 2 / 6, 1 / 6]
    entropy = -sum(p * math.log(p) for p in shares)
    assert asr["entropy"] == pytest.approx(entropy) and asr["effective"] == pytest.approx(math.exp(entropy))
    assert asr["never_used"] == 5 / 8 and asr["most_used"] == [0, 1, 2] and asr["clips"] == 3


def test_attention_counts_by_weight() -> None:
    table = choices(weighted=True).membership()
    assert table[0].tolist() == pytest.approx([8 * 0.3, 8 * 0.2, 0, 0, 0, 0, 0, 0])


def test_jaccard_is_the_mean_over_pairs_of_clips() -> None:
    names, table = prompts.jaccard(choices().membership(), TASKS)
    assert names == ["asr", "caption", "qa"]
    for (i, a), (j, b) in itertools.product(enumerate(names), repeat=2):
        pairs = [len(set(SETS[x]) & set(SETS[y])) / len(set(SETS[x]) | set(SETS[y]))
                 for x, y in itertools.product(range(len(SETS)), repeat=2)
                 if x != y and TASKS[x] == a and TASKS[y] == b]
        if pairs:
            assert table[i, j] == pytest.approx(np.mean(pairs)), (a, b)
        else:
            assert np.isnan(table[i, j])  # one clip of qa: no pair


def test_pca_is_that_of_unit_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 12)) * np.linspace(0.1, 9, 30)[:, None]
    points, share = prompts.pca(vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    theirs = PCA(2).fit(unit)
    np.testing.assert_allclose(np.abs(points), np.abs(theirs.transform(unit)), atol=1e-9)
    np.testing.assert_allclose(share, theirs.explained_variance_ratio_, rtol=1e-9)
    assert all(points[np.abs(points[:, axis]).argmax(), axis] > 0 for axis in range(2))


def test_pca_of_two_points_and_of_equal_ones() -> None:
    points, share = prompts.pca(np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert abs(points[0, 0]) == pytest.approx(math.sqrt(0.5)) and share == pytest.approx([1.0, 0.0])
    points, share = prompts.pca(np.ones((4, 3)))
    np.testing.assert_allclose(points, 0, atol=1e-12)


def test_nearest_tokens_by_cosine() -> None:
    random = np.random.default_rng(1)
    values, table = random.normal(size=(4, 6)), random.normal(size=(50, 6)) * random.uniform(0.1, 9, (50, 1))
    for value, found in zip(values, prompts.nearest_tokens(values, table, 3), strict=True):
        cosines = [float(value @ row / math.sqrt(value @ value) / math.sqrt(row @ row)) for row in table]
        best = sorted(range(50), key=lambda token: -cosines[token])[:3]
        assert [token for token, _ in found] == best
        assert [cosine for _, cosine in found] == pytest.approx([cosines[token] for token in best])


def pool_where(sets: list[tuple[int, ...]], tasks: list[str], size: int = 10) -> tuple[dict[str, Any], np.ndarray]:
    table = prompts.Choices(tasks, sets, [(0.1,) * len(row) for row in sets], size, weighted=False).membership()
    return prompts.usage_summary(table), prompts.jaccard(table, tasks)[1]


HALVES = ["asr"] * 20 + ["caption"] * 20


@pytest.mark.parametrize("state, sets", [
    ("collapsed", [(0, 1)] * 40),
    # Three of four prompts in front of every clip, one of two behind them, half of the pool never picked.
    ("collapsed", [(0, 1, 2, 3 + n % 2) for n in range(40)]),
    # One prompt in front of every clip, however much the others vary.
    ("narrow", [(0, n % 9 + 1, (n + 1) % 9 + 1) for n in range(40)]),
    ("narrow", [(0, 1, 2)] * 20 + [(3, 4, 5)] * 20),
    ("alike", [tuple((n + place) % 10 for place in range(8)) for n in range(20)] * 2),
    ("varied", [(n % 5, (n + 1) % 5) for n in range(20)] + [(5 + n % 5, 5 + (n + 1) % 5) for n in range(20)]),
])
def test_the_verdict_names_the_state(state: str, sets: list[tuple[int, ...]]) -> None:
    found, words = prompts.verdict("similarity", len(sets[0]), *pool_where(sets, HALVES))
    assert found == state, words
    assert ("collapsed" in words) == (state == "collapsed")


def test_tasks_are_recognised_by_the_nearest_centroid() -> None:
    """Against plain loops, leaving one out; sets that tell nothing recognise nothing."""
    random = np.random.default_rng(2)
    tasks = ["asr"] * 12 + ["caption"] * 9 + ["qa"] * 7
    table = np.zeros((len(tasks), 10))
    for row, task in zip(table, tasks, strict=True):
        weights = np.roll(np.linspace(1, 9, 10), {"asr": 0, "caption": 3, "qa": 6}[task])
        row[random.choice(10, 4, replace=False, p=weights / weights.sum())] = 1
    found = prompts.recognised(table, tasks)
    for task, share in found.items():
        right = 0
        for i in (i for i, name in enumerate(tasks) if name == task):
            far = {}
            for name in ("asr", "caption", "qa"):
                rest = [table[j] for j, other in enumerate(tasks) if other == name and j != i]
                far[name] = math.dist(table[i], np.mean(rest, axis=0))
            right += all(far[task] < far[name] - 1e-9 for name in far if name != task)
        assert share == pytest.approx(right / tasks.count(task))
    assert 0.3 < np.mean(list(found.values())) < 1
    assert set(prompts.recognised(np.ones((8, 4)), ["a", "b"] * 4).values()) == {0.0}
    apart = np.repeat(np.eye(2), 4, axis=0)
    assert prompts.recognised(apart, ["a"] * 4 + ["b"] * 4) == {"a": 1.0, "b": 1.0}
    assert prompts.recognised(apart, ["a"] * 8) == {} and prompts.recognised(apart[:3], ["a", "a", "b"]) == {}


def test_the_most_frequent_set() -> None:
    assert prompts.most_frequent_set(choices().membership()) == pytest.approx(2 / 6)


def test_keys_in_one_place_share_a_label() -> None:
    keys = np.array([[0.0, 0.0], [1.0, 0.5], [0.001, 0.0], [0.0, 0.5]])
    assert labels_of(keys, np.array([1.0, 0.5])) == [(0, 0, "0, 2"), (1, 0.5, "1"), (0, 0.5, "3")]


def test_the_verdict_counts() -> None:
    summary, overlap = pool_where([(0, 1)] * 40, HALVES)
    assert prompts.verdict("similarity", 2, summary, overlap)[1].startswith(
        "The pool has collapsed: clips get nearly the same 2 prompts. 2.0 of 10 prompts are effectively in use "
        "at k = 2; 2 are in front of more than 90 % of the clips, 8 were never picked.")
    assert prompts.verdict("fixed", 10, summary, overlap)[0] == "not chosen"
