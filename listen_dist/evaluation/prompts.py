"""What the pool learned, in numbers. Pure functions of arrays; report.py gathers the arrays and draws.

Usage of prompt n by a task: the share of the task's clips that have n in front. (With
`pool.selection = attention` all are always in front; there it is the mean weight times N.)
Entropy and effective number are those of the usage, scaled to sum to one: exp(entropy) = 1 where
one prompt does everything, N where all do alike. It cannot be less than k, since a clip's k prompts
are different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from listen_dist.engine.meter import COLLAPSED, effective_number, share_in_use

State = Literal["collapsed", "narrow", "alike", "varied", "not chosen"]

NARROW = 0.5
"""Effective prompts beyond k, as a share of the N − k that there could be, under which a pool is narrow (under
`meter.COLLAPSED` it has collapsed)."""
NEARLY_ALWAYS = 0.9
"""A prompt in front of more than this share of all clips carries no choice; with one the pool is narrow too."""
ALIKE = 0.6
"""Mean overlap between different tasks above which tasks are not told apart (random sets of 4 of 10: 0.27)."""


CURE = "try pool.query=centred, a smaller pool.match_weight, or a smaller pool"


@dataclass(frozen=True)
class Choices:
    """The prompts of the clips of one split."""

    tasks: list[str]
    """Each clip's task."""
    prompts: list[tuple[int, ...]]
    """What was put in front of each clip."""
    scores: list[tuple[float, ...]]
    pool_size: int
    """N."""
    weighted: bool
    """All prompts are always in front and the scores tell them apart (`attention`)."""

    def membership(self) -> np.ndarray:
        """[clips, N]: 1 where a prompt is in front of a clip, or N times its weight."""
        table = np.zeros((len(self.tasks), self.pool_size))
        for row, (prompts, scores) in enumerate(zip(self.prompts, self.scores, strict=True)):
            for prompt, score in zip(prompts, scores, strict=True):
                if prompt >= 0:
                    table[row, prompt] = self.pool_size * score if self.weighted else 1
        return table


def usage_summary(membership: np.ndarray) -> dict[str, Any]:
    """Usage [N] and diversity of some clips' choices [clips, N]."""
    usage = membership.mean(0)
    effective = effective_number(usage)
    return {"clips": len(membership), "usage": usage.tolist(), "effective": effective,
            "entropy": float(np.log(effective)) if effective else 0.0,
            "never_used": float((usage == 0).mean()),
            "most_used": [int(n) for n in np.argsort(-usage, kind="stable")[:5] if usage[n] > 0]}


def most_frequent_set(membership: np.ndarray) -> float:
    """Share of the clips [clips, N] that have the set of prompts which occurs most often."""
    return float(np.unique(membership > 0, axis=0, return_counts=True)[1].max() / len(membership))


def recognised(membership: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """How often a clip's prompts alone tell its task: by task, the share of its clips nearest to their own centroid.

    A centroid is the mean of a task's rows [N], without the row in question. Tasks with one clip are left out;
    empty where fewer than two tasks are left. A guess is right in 1 / tasks of the cases.
    """
    labels = np.array(tasks)
    names = [name for name in sorted(set(tasks)) if (labels == name).sum() > 1]
    if len(names) < 2:
        return {}
    sums = np.stack([membership[labels == name].sum(0) for name in names])
    counts = np.array([(labels == name).sum() for name in names])
    found = {}
    for i, name in enumerate(names):
        rows = membership[labels == name]
        others = np.linalg.norm(rows[:, None] - sums / counts[:, None], axis=2)  # [clips, tasks]
        others[:, i] = np.linalg.norm(rows - (sums[i] - rows) / (counts[i] - 1), axis=1)
        # Where another task's centroid is as near, the prompts don't tell.
        best = np.delete(others, i, axis=1).min(1)
        found[name] = float((others[:, i] < best - 1e-9).mean())
    return found


def jaccard(membership: np.ndarray, tasks: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Mean Jaccard overlap of the sets of two different clips, one of each task.

    Args:
        membership: [clips, N], non-zero where a prompt is in a clip's set.
        tasks: each clip's task.

    Returns:
        the tasks in the order of the alphabet, and [tasks, tasks] overlaps 0 … 1; NaN on the diagonal
        of a task with one clip only.
    """
    names = sorted(set(tasks))
    sets = {}
    for name in names:
        rows = membership[np.array([task == name for task in tasks])] > 0
        # Few different sets occur: each once, with its count.
        sets[name] = np.unique(rows, axis=0, return_counts=True)
    table = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            (rows_a, counts_a), (rows_b, counts_b) = sets[a], sets[b]
            both = rows_a.astype(float) @ rows_b.T.astype(float)
            either = rows_a.sum(1)[:, None] + rows_b.sum(1)[None] - both
            overlap = np.divide(both, either, out=np.ones_like(both), where=either > 0)
            pairs = np.outer(counts_a, counts_b).astype(float)
            if i == j:  # a clip is no pair with itself
                pairs -= np.diag(counts_a)
            if pairs.sum():
                table[i, j] = (overlap * pairs).sum() / pairs.sum()
    return names, table


def pca(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Principal components of unit vectors (the match looks at directions alone).

    Args:
        vectors: [points, D]; scaled to norm 1 here.

    Returns:
        [points, 2] coordinates, and the share of the variance on each axis. The sign of an axis is
        set so that its largest coordinate is positive.
    """
    unit = vectors / np.maximum(1e-12, np.linalg.norm(vectors, axis=1, keepdims=True))
    centred = unit - unit.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    points[:, : min(2, len(sizes))] = (left * sizes)[:, :2]
    for axis in range(2):
        if points[np.abs(points[:, axis]).argmax(), axis] < 0:
            points[:, axis] *= -1
    share = np.zeros(2)
    share[: min(2, len(sizes))] = (sizes**2 / max(1e-300, (sizes**2).sum()))[:2]
    return points, share.tolist()


def nearest_tokens(values: np.ndarray, embeddings: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """The `count` vocabulary entries nearest to each value [N, D] by cosine to embeddings [V, D]: (token, cosine)."""
    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(1e-12, np.linalg.norm(rows, axis=1, keepdims=True))

    cosines = unit(values) @ unit(embeddings).T  # [N, V]
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return [[(int(token), float(row[token])) for token in tokens] for row, tokens in zip(cosines, best, strict=True)]


def verdict(selection: str, k: int, summary: dict[str, Any], overlap: np.ndarray) -> tuple[State, str]:
    """How the pool is used, as a word and as sentences.

    Args:
        selection: `pool.selection`.
        k: prompts in front of a clip.
        summary: `usage_summary` over all clips.
        overlap: of `jaccard`.
    """
    size, effective = len(summary["usage"]), summary["effective"]
    never = round(size * summary["never_used"])
    if selection != "similarity" or k == size:
        return "not chosen", (f"Nothing is chosen here: all prompts a clip can get ({k} of {size}) are always in front "
                              f"of it (pool.selection = {selection}).")
    others = overlap[~np.eye(len(overlap), dtype=bool)]
    between = float(np.nanmean(others)) if others.size else float("nan")
    always = sum(share > NEARLY_ALWAYS for share in summary["usage"])
    in_use = (f"{effective:.1f} of {size} prompts are effectively in use at k = {k}; {always} are in front of more "
              f"than {100 * NEARLY_ALWAYS:.0f} % of the clips, {never} were never picked.")
    share = share_in_use(effective, k, size)
    if share < COLLAPSED:
        return "collapsed", (f"The pool has collapsed: clips get nearly the same {k} prompts. {in_use} "
                             f"The choice carries hardly any information; {CURE}.")
    if share < NARROW or always:
        return "narrow", (f"Much of the pool carries no choice. {in_use} This is the way into a collapse; watch the "
                          f"curve of the effective number, and {CURE}.")
    if between > ALIKE:
        return "alike", (f"Tasks are hardly told apart: the prompts of two clips of different tasks overlap by "
                         f"{between:.2f} (Jaccard). {in_use}")
    shared = "" if np.isnan(between) else (
        f" The prompts of two clips of different tasks overlap by {between:.2f} (Jaccard) on average.")
    return "varied", f"The choice varies with the clip. {in_use}{shared}"
