"""The figures of the report, from the numbers in report.json alone. PNG bytes; no display is needed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GREY = "#666666"
DOTS_PER_INCH = 150


def draw_all(data: dict[str, Any]) -> dict[str, bytes]:
    """Name to PNG of every figure that the numbers allow."""
    figures = {"usage": usage(data)}
    if len(data["overlap"]["tasks"]) > 1:
        figures["overlap"] = overlap(data["overlap"])
    if data["training"]["steps"]:
        figures["training"] = training(data)
    if data["map"]:
        figures["map"] = keys_and_queries(data["map"])
    return figures


def usage(data: dict[str, Any]) -> bytes:
    """Heat map tasks × prompts."""
    tasks = list(data["tasks"])
    table = np.array([data["tasks"][task]["usage"] for task in tasks])
    figure, axes = _figure(8.0, 1.3 + 0.38 * len(tasks))
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=max(1.0, table.max()), aspect="auto")
    axes.set_yticks(range(len(tasks)), tasks)
    step = max(1, table.shape[1] // 25)
    axes.set_xticks(range(0, table.shape[1], step))
    axes.set_xlabel("prompt")
    figure.colorbar(image, ax=axes, label="mean weight × N" if data["weighted"] else "share of clips")
    return _png(figure)


def overlap(data: dict[str, Any]) -> bytes:
    """Heat map tasks × tasks, with the numbers in it."""
    tasks = data["tasks"]
    table = np.array(data["jaccard"], dtype=float)
    figure, axes = _figure(8.0, 1.6 + 0.5 * len(tasks))
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
    axes.set_yticks(range(len(tasks)), tasks)
    for i, j in np.ndindex(*table.shape):
        text = "–" if np.isnan(table[i, j]) else f"{table[i, j]:.2f}"
        axes.text(j, i, text, ha="center", va="center", color="white" if table[i, j] > 0.55 else "black", fontsize=9)
    figure.colorbar(image, ax=axes, label="Jaccard overlap")
    return _png(figure)


def training(data: dict[str, Any]) -> bytes:
    """The effective number of prompts and the share of unused ones over the steps, all clips and each task."""
    curves = data["training"]
    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours = _colours([name for name in curves["effective"] if name != "all"])
    for axes, key, label, top in ((upper, "effective", "effective prompts", data["prompts"]),
                                  (lower, "unused", "share never used", 1.0)):
        _plain(axes)
        for name, values in curves[key].items():
            known = [(step, value) for step, value in zip(curves["steps"], values, strict=True) if value is not None]
            if known:
                is_all = name == "all"
                axes.plot(*zip(*known, strict=True), label="all clips" if is_all else name,
                          linewidth=2.2 if is_all else 1, color="black" if is_all else colours[name])
        axes.set_ylabel(label)
        axes.set_ylim(0, top * 1.05)
    lower.set_xlabel("optimizer step")
    upper.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _png(figure)


def keys_and_queries(data: dict[str, Any]) -> bytes:
    """Both on the same two principal axes; queries coloured by task, keys numbered."""
    figure, axes = _figure(8.0, 5.0)
    colours = _colours(sorted({query["task"] for query in data["queries"]}))
    for task, colour in colours.items():
        points = np.array([query["at"] for query in data["queries"] if query["task"] == task])
        axes.scatter(points[:, 0], points[:, 1], s=12, color=colour, alpha=0.6, label=task, linewidths=0)
    keys = np.array(data["keys"])
    axes.scatter(keys[:, 0], keys[:, 1], s=70, marker="D", facecolors="white", edgecolors="black", label="key")
    for x, y, label in labels_of(keys, np.ptp(np.concatenate([keys, [query["at"] for query in data["queries"]]]), 0)):
        axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    for axis, share in zip((axes.xaxis, axes.yaxis), data["variance"], strict=True):
        axis.set_label_text(f"{100 * share:.0f} % of the variance")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), markerscale=1.3)
    return _png(figure)


def labels_of(keys: np.ndarray, extent: np.ndarray) -> list[tuple[float, float, str]]:
    """One label for keys [N, 2] that lie so near to each other that their numbers would cover each other.

    Args:
        extent: width and height of the map.
    """
    cells: dict[tuple[int, ...], list[int]] = {}
    for number, cell in enumerate(np.rint(keys / np.maximum(1e-12, 0.03 * extent)).astype(int).tolist()):
        cells.setdefault(tuple(cell), []).append(number)
    return [(*keys[numbers[0]].tolist(), ", ".join(map(str, numbers))) for numbers in cells.values()]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=GREY, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colours(names: list[str]) -> dict[str, Any]:
    return {name: colormaps["tab10"](i % 10) for i, name in enumerate(names)}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()
