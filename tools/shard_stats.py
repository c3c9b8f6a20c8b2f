"""What `shard_dataset.py --stats` prints, `--plot` draws and `--verify` checks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from listen_dist.data.shard_members import ShardError, Want
from listen_dist.data.shards import FEATURES_VERSION, ShardIndex
from listen_dist.errors import ListenError
from listen_dist.structures import SAMPLE_RATE, AudioSample

_EDGES = [0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 1e9]
"""Seconds: the bins of the histogram of lengths."""


def verify_all(index: ShardIndex, max_seconds: float) -> None:
    """Check every hash, read and decode every sample, and compare it with what the sidecar says of it.

    Raises:
        ShardError: a hash differs, or samples are wrong: it names the first, and each is printed.
    """
    index.verify()
    want: Want = "both" if index.features else "audio"
    shard_of: dict[str, str] = {}
    silent: list[str] = []
    wrong: list[ShardError] = []
    with tqdm(total=index.samples, desc="verify", unit="clip", mininterval=0.5 if sys.stderr.isatty() else 30.0) as bar:
        for number, entry in enumerate(index.shards):
            table, where = index.shard_table(number), str(index.folder / entry.name)
            for row, name in enumerate(table.ids):
                bar.update()
                try:
                    if name in shard_of:
                        raise ShardError(f"{where}: id {name!r} stands in {shard_of[name]} too; ids are unique in a "
                                         "set")
                    shard_of[name] = where
                    sample = index.read_sample(number, row, want=want, max_seconds=max_seconds)
                    _compare(sample, float(table.seconds[row]), str(table.tasks[row]), where)
                except ShardError as error:
                    tqdm.write(str(error), file=sys.stderr)
                    wrong.append(error)
                    continue
                if sample.waveform is not None and sample.waveform.min() == sample.waveform.max():
                    silent.append(name)
    if wrong:
        raise ShardError(f"{wrong[0]} ({len(wrong)} of {index.samples} samples are wrong)")
    print(f"{index.folder}: all {index.samples} samples in {len(index.shards)} shards are intact")
    if silent:
        print(f"{len(silent)} of them are digital silence, for instance {silent[0]}")
    if any(info and info.version != FEATURES_VERSION for info in (index.features, index.audio_features)):
        print("its stored frames were made by another version of this tool; write them anew (docs/data.md, Older "
              "shards)")


def _compare(sample: AudioSample, seconds: float, task: str, where: str) -> None:
    assert sample.waveform is not None
    found = len(sample.waveform) / SAMPLE_RATE
    if sample.record.task != task or abs(found - seconds) > 1 / SAMPLE_RATE:
        raise ShardError(f"{where}: sample {sample.record.id!r} is {sample.record.task}, {found:.4f} s; its sidecar "
                         f"says {task}, {seconds:.4f} s; write the shard anew")


def print_stats(index: ShardIndex) -> None:
    """Print hours, tasks, languages and a histogram of lengths."""
    seconds, tasks = _columns(index)
    stored = [f"{kind}, {info.width} wide, {info.rate} a second"
              for kind, info in (("speech", index.features), ("audio", index.audio_features)) if info]
    print(f"{index.folder}: {index.samples} samples, {seconds.sum() / 3600:.2f} h, {index.skipped} skipped")
    print(f"shards: {len(index.shards)}, {sum(shard.bytes for shard in index.shards) / 1e6:.1f} MB")
    print(f"features: {'; '.join(stored) or 'none'}")
    print(f"{'task':<22}{'samples':>9}{'hours':>9}{'mean s':>9}")
    for task in sorted(index.tasks):
        chosen = seconds[tasks == task]
        print(f"{task:<22}{len(chosen):>9}{chosen.sum() / 3600:>9.2f}{chosen.mean():>9.2f}")
    print("languages: " + ", ".join(f"{name or 'none'} {count}" for name, count in index.languages.items()))
    counts, _ = np.histogram(seconds, _EDGES)
    for low, high, count in zip(_EDGES, _EDGES[1:], counts, strict=False):
        label = f"{low:g} to {high:g} s" if high < 1e9 else f"over {low:g} s"
        print(f"{label:>14}{count:>9}  {'#' * round(50 * count / max(counts.max(), 1))}")


def plot(index: ShardIndex, path: Path) -> None:
    """Draw the lengths, stacked by task, and the hours of each task into a png, pdf or svg.

    Raises:
        ListenError: another kind of file.
    """
    seconds, tasks = _columns(index)
    names = sorted(index.tasks)
    groups = [seconds[tasks == name] for name in names]
    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths, hours = figure.subplots(1, 2, width_ratios=(2, 1))
    lengths.hist(groups, bins=40, stacked=True, label=names)
    lengths.set(xlabel="seconds", ylabel="samples", title=f"{index.samples} samples, {seconds.sum() / 3600:.2f} h")
    lengths.legend()
    hours.barh(names, [group.sum() / 3600 for group in groups], color=[f"C{i}" for i in range(len(names))])
    hours.set(xlabel="hours", title=str(index.folder)[-40:])
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ListenError(f"--plot {path}: {error}") from None
    print(f"{index.folder}: drawn in {path}")


def _columns(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and task of every sample."""
    tables = [index.shard_table(number) for number in range(len(index.shards))]
    return np.concatenate([table.seconds for table in tables]), np.concatenate([table.tasks for table in tables])
