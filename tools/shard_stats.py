"""What `shard_dataset.py --stats` prints and `--verify` checks."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from listen_dist.data.shard_members import Want
from listen_dist.data.shards import ShardIndex

_EDGES = [0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 1e9]
"""Seconds: the bins of the histogram of lengths."""


def verify_all(index: ShardIndex, max_seconds: float) -> None:
    """Check every hash, and read and decode every sample.

    Raises:
        ShardError: the first thing that is wrong.
    """
    index.verify()
    want: Want = "both" if index.features else "audio"
    with tqdm(total=index.samples, desc="verify", unit="clip", disable=None) as bar:
        for number in range(len(index.shards)):
            for row in range(len(index.shard_table(number))):
                index.read_sample(number, row, want=want, max_seconds=max_seconds)
                bar.update()
    print(f"{index.folder}: all {index.samples} samples in {len(index.shards)} shards are intact")


def print_stats(index: ShardIndex) -> None:
    """Print hours, tasks, languages and a histogram of lengths."""
    tables = [index.shard_table(number) for number in range(len(index.shards))]
    seconds = np.concatenate([table.seconds for table in tables])
    tasks = np.concatenate([table.tasks for table in tables])
    features = index.features
    print(f"{index.folder}: {index.samples} samples, {seconds.sum() / 3600:.2f} h, {index.skipped} skipped")
    print(f"shards: {len(index.shards)}, {sum(shard.bytes for shard in index.shards) / 1e6:.1f} MB")
    print(f"features: {f'speech, {features.width} wide, {features.rate} a second' if features else 'none'}")
    print(f"{'task':<22}{'samples':>9}{'hours':>9}{'mean s':>9}")
    for task in sorted(index.tasks):
        chosen = seconds[tasks == task]
        print(f"{task:<22}{len(chosen):>9}{chosen.sum() / 3600:>9.2f}{chosen.mean():>9.2f}")
    print("languages: " + ", ".join(f"{name or 'none'} {count}" for name, count in index.languages.items()))
    counts, _ = np.histogram(seconds, _EDGES)
    for low, high, count in zip(_EDGES, _EDGES[1:], counts, strict=False):
        label = f"{low:g} to {high:g} s" if high < 1e9 else f"over {low:g} s"
        print(f"{label:>14}{count:>9}  {'#' * round(50 * count / max(counts.max(), 1))}")
