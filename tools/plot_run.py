"""Draw a run's curves from its metrics.jsonl: each task's training loss, and its dev score where one was taken.

    python tools/plot_run.py runs/demo_full --out curves.png
    python tools/plot_run.py runs/demo_full --by clips     # or minutes: of training, evaluations included
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

from listen_dist import exits
from listen_dist.command_line import user_path
from listen_dist.errors import ListenError

Curves = dict[str, tuple[list[float], list[float]]]
"""Name → places on the axis and values."""
AXES = {"step": ("optimizer step", "step", 1), "clips": ("clips seen", "clips_seen", 1),
        "minutes": ("minutes", "elapsed_seconds", 60)}
"""Choice → label, metric, and what the metric is divided by."""


def read_curves(run: Path, by: str = "step") -> tuple[Curves, Curves]:
    """Training losses by task, and dev scores by "task metric", against the axis `by`.

    Raises:
        ListenError: the run has no metrics, or a line of them is no JSON object.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ListenError(f"{file}: not there; name the folder of a run (run_dir)")
    _, metric, unit = AXES[by]
    losses: Curves = {}
    scores: Curves = {}
    at = 0.0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ListenError(f"{file}:{number}: no line of metrics ({error!r})") from None
        # A line of dev scores has the step alone; the training's line before it has the rest.
        at = entry.get(metric, at * unit) / unit
        for key, value in entry.items():
            if key.startswith("loss_"):
                _add(losses, key.removeprefix("loss_"), at, value)
            elif key.startswith("dev/"):
                _add(scores, key.removeprefix("dev/").replace("/", " "), at, value)
    if not losses:
        raise ListenError(f"{file}: no training loss in it yet")
    return losses, scores


def _add(curves: Curves, name: str, at: float, value: float) -> None:
    places, values = curves.setdefault(name, ([], []))
    if at not in places:  # a run that was killed reports the steps after its last checkpoint again, alike
        places.append(at)
        values.append(value)


def draw(losses: Curves, scores: Curves, out: Path, label: str) -> None:
    """Write the picture; the suffix of `out` chooses its format.

    Raises:
        ListenError: one that matplotlib doesn't draw.
    """
    panels = [("training loss a target token", losses)] + ([("dev score", scores)] if scores else [])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels, strict=True):
        for name, (places, values) in sorted(curves.items()):
            axis.plot(places, values, label=name, marker="o" if len(places) < 20 else "", markersize=3)
        axis.set(title=title, xlabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    try:
        figure.savefig(out, dpi=110)
    except ValueError as error:
        raise ListenError(f"--out {out}: {error}") from None
    finally:
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    return exits.run(lambda: plot(argv))


def plot(argv: Sequence[str] | None) -> None:
    """Draw the curves of a run and print where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="run folder")
    parser.add_argument("--out", type=user_path, help="picture to write (default: curves.png in the run folder)")
    parser.add_argument("--by", choices=list(AXES), default="step", help="horizontal axis (default: step)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run / "curves.png"
    draw(*read_curves(arguments.run, arguments.by), out, AXES[arguments.by][0])
    print(out)


if __name__ == "__main__":
    sys.exit(main())
