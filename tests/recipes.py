"""What the tests of the recipes share: real encoded sounds, and running a recipe on a miniature set."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from listen_dist.data.manifest import read_manifest
from listen_dist.structures import Record

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS / "prepare"))

from recipe import PrepareError  # noqa: E402

Damage = Callable[[Path], None]


def sound(path: Path, seconds: float = 0.3, rate: int = 16_000) -> Path:
    """Write noise in the format of the path's suffix (flac, wav or mp3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.2, 0.2, round(seconds * rate)), rate)
    return path


def lines(path: Path, *rows: str) -> Path:
    """Write lines of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def run_recipe(recipe: str, out: Path, *arguments: object) -> dict[str, list[Record]]:
    """Run tools/prepare/RECIPE.py in this process and return the manifests it wrote: `name.split` → records."""
    module = importlib.import_module(recipe)
    module.main([*map(str, arguments), "--out", str(out), "--threads", "2"])
    return {path.name.removesuffix(".jsonl"): list(read_manifest(path)) for path in sorted(out.glob("*.jsonl"))}


def error_of(recipe: str, out: Path, *arguments: object) -> str:
    """Run a recipe that must fail, and return its message, which must be one line and leave no manifest behind."""
    with pytest.raises(PrepareError) as raised:
        run_recipe(recipe, out, *arguments)
    message = str(raised.value)
    assert "\n" not in message
    assert not list(out.glob("*.jsonl"))
    return message


def edit(name: str, old: str, new: str) -> Damage:
    """Return a damage: the first `old` in the file `name` of a folder becomes `new`."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return damage


def remove(name: str) -> Damage:
    """Return a damage: the file or folder `name` of a folder is gone."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")

    return damage
