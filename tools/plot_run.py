"""Draw a run's curves from its metrics.jsonl: each task's training loss, and its dev score where one was taken.

    python tools/plot_run.py runs/demo_full --out curves.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curves = dict[str, tuple[list[int], list[float]]]
"""Name → steps and values."""


def read_curves(run: Path) -> tuple[Curves, Curves]:
    """Training losses by task, and dev scores by "task metric".

    Raises:
        ValueError: the run has no metrics, or a line of them is no JSON object.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: not there; name the folder of a run (run_dir)")
    losses: Curves = {}
    scores: Curves = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: no line of metrics ({error!r})") from None
        for key, value in entry.items():
            if key.startswith("loss_"):
                _add(losses, key.removeprefix("loss_"), step, value)
            elif key.startswith("dev/"):
                _add(scores, key.removeprefix("dev/").replace("/", " "), step, value)
    if not losses:
        raise ValueError(f"{file}: no training loss in it yet")
    return losses, scores


def _add(curves: Curves, name: str, step: int, value: float) -> None:
    steps, values = curves.setdefault(name, ([], []))
    if step not in steps:  # a run that was killed reports the steps after its last checkpoint again, alike
        steps.append(step)
        values.append(value)


def draw(losses: Curves, scores: Curves, out: Path) -> None:
    """Write the picture; the suffix of `out` chooses its format."""
    panels = [("training loss a target token", losses)] + ([("dev score", scores)] if scores else [])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels, strict=True):
        for name, (steps, values) in sorted(curves.items()):
            axis.plot(steps, values, label=name, marker="o" if len(steps) < 20 else "", markersize=3)
        axis.set(title=title, xlabel="optimizer step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the run folder)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run / "curves.png"
    try:
        draw(*read_curves(arguments.run), out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
