"""Is run B better than run A? A paired test on the same samples.

    python tools/compare_runs.py runs/a runs/b
    python tools/compare_runs.py runs/a/predictions.dev.jsonl runs/b/predictions.dev.jsonl --json
    python tools/compare_runs.py runs/a runs/whisper-tiny.en --tasks asr

A and B are folders with predictions.jsonl, or such files. For every metric: both values, the difference
B − A with its 95 % interval, and p: how often resampling alone makes a difference as large (two-sided, 1,000
resamples of the same clips for both). Refuses runs over other samples, splits or references; with --tasks
only these tasks are looked at, so that one run may have more than the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from listen_dist import exits
from listen_dist.command_line import user_path
from listen_dist.errors import ListenError
from listen_dist.evaluation.bootstrap import compare
from listen_dist.evaluation.predictions import Prediction, read_predictions
from listen_dist.evaluation.scoring import is_count, lower_is_better, score_task


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    return exits.run(lambda: show(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=user_path, help="run folder or predictions file")
    parser.add_argument("b", type=user_path)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="compare these alone (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def show(options: argparse.Namespace) -> None:
    """Compare the two runs and print what was found."""
    found = compare_runs(options.a, options.b, options.tasks)
    print(json.dumps(found, indent=1) if options.json else table(found))


def compare_runs(a: Path, b: Path, tasks: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Task → metric → both values, interval and p.

    Args:
        tasks: those to compare; default: all.

    Raises:
        ListenError: the two runs are not over the same samples; the message says how they differ.
    """
    check_same_split(a, b, some=bool(tasks))
    first, second = ({(row.task, row.id): row for row in read_predictions(file_of(path))
                      if not tasks or row.task in tasks} for path in (a, b))
    for task in tasks:
        if task not in {name for name, _ in first}:
            raise ListenError(f"{a}: no prediction of task {task!r}")
    check_same_samples(a, b, first, second)
    found: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(task for task, _ in first):
        rows = [(row, second[key]) for key, row in first.items() if key[0] == task]
        scores = [score_task(task, side) for side in zip(*rows, strict=True)]
        found[task] = {name: {"samples": len(rows), "better": "lower" if lower_is_better(name) else "higher",
                              **asdict(compare(figure, scores[1].figures[name]))}
                       for name, figure in scores[0].figures.items()
                       if name in scores[1].figures and not is_count(name)}
    return found


def file_of(path: Path) -> Path:
    return path / "predictions.jsonl" if path.is_dir() else path


def check_same_split(a: Path, b: Path, some: bool) -> None:
    """Compare what results.json pins of the data, where it is there.

    Args:
        some: one run may have been scored on more sets than the other.
    """
    pinned = []
    for path in map(file_of, (a, b)):
        results = path.with_name(path.name.replace("predictions", "results", 1)).with_suffix(".json")
        tree = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        pinned.append((tree.get("split"), set(tree.get("data_fingerprints", {}).values())))
    (split_a, data_a), (split_b, data_b) = pinned
    if split_a and split_b and split_a != split_b:
        raise ListenError(f"{a} is of split {split_a!r}, {b} of {split_b!r}; evaluate both on one split")
    alike = data_a <= data_b or data_b <= data_a if some else data_a == data_b
    if data_a and data_b and not alike:
        raise ListenError(f"{a} and {b} are of sets whose bytes differ (data_fingerprints); evaluate both on the same")


def check_same_samples(a: Path, b: Path, first: dict[tuple[str, str], Prediction],
                       second: dict[tuple[str, str], Prediction]) -> None:
    for path, other, mine, theirs in ((a, b, first, second), (b, a, second, first)):
        missing = sorted(mine.keys() - theirs.keys())
        if missing:
            task, name = missing[0]
            raise ListenError(f"{len(missing)} samples of {path} are not in {other}, the first {name!r} ({task}); "
                             "evaluate both on the same split and limit, or compare some --tasks alone")
    for key, row in first.items():
        if row.answers != second[key].answers:
            raise ListenError(f"sample {row.id!r}: the references differ between {a} and {b}; evaluate both on the "
                             "same data")


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'task':<22}{'metric':<22}{'A':>9}{'B':>9}{'B − A':>9}  {'95 % interval':<20}{'p':>7}"]
    for task, metrics in found.items():
        for name, row in metrics.items():
            change = row["second"] - row["first"]
            side = "" if row["p"] >= 0.05 else "B" if (change < 0) == (row["better"] == "lower") else "A"
            span = f"{row['low']:+.3f} … {row['high']:+.3f}"
            lines.append(f"{task:<22}{name:<22}{row['first']:>9.3f}{row['second']:>9.3f}{change:>+9.3f}  "
                         f"{span:<20}{row['p']:>7.3f}" + (f"  {side} is better" if side else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
