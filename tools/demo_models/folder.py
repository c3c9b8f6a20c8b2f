"""Model folders that are either whole or not there: built beside, sealed with SOURCE.json, renamed.

SOURCE.json says what the folder was made from, by which recipe, under which licence, and holds the size and
SHA-256 of every other file.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import DemoModelError
from .fetch import Package, Weights, sha256_of

SEAL = "SOURCE.json"
# Raise it whenever a conversion writes something else than before: folders of an older recipe are made again.
RECIPE = 1


def fault(folder: Path, source: Package | Weights) -> str | None:
    """Why the folder can't be used as the conversion of `source`, or None when it can."""
    if not folder.is_dir():
        return "not there yet"
    try:
        seal: dict[str, Any] = json.loads((folder / SEAL).read_text("utf-8"))
        recipe, sealed, files = seal["recipe"], seal["source"], dict(seal["files"])
    except FileNotFoundError:
        return f"has no {SEAL}"
    except (ValueError, KeyError, TypeError):
        return f"{SEAL} can't be read"
    if recipe != RECIPE or sealed != asdict(source):
        return "made from another package or by another version of this tool"
    if (there := sorted(_files(folder))) != sorted(files):
        return f"holds {there}, {SEAL} lists {sorted(files)}"
    for name, facts in files.items():
        if facts != _facts(folder / name):
            return f"{name} was changed or damaged"
    return None


@contextmanager
def replacing(folder: Path, source: Package | Weights) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; when the block ends well, seal it and rename it to `folder`.

    After an error the half-made sibling goes and `folder` is as before. A folder in the way is deleted when
    this tool made it, else set aside: it may be somebody's own model.
    Raises DemoModelError when the folder can't be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DemoModelError(f"{partial}: can't be made ({error}). Choose another --out.") from None
    try:
        yield partial
        _write_seal(partial, source)
        _clear(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Make room for a folder of this name."""
    if (folder / SEAL).exists():
        shutil.rmtree(folder)
    elif folder.exists():
        aside = folder.with_name(f"{folder.name}.set-aside-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"{folder}: not made by this tool, moved to {aside}", flush=True)


def _write_seal(folder: Path, source: Package | Weights) -> None:
    """Write SOURCE.json for the files that are there."""
    files = {name: _facts(folder / name) for name in sorted(_files(folder))}
    seal = {"recipe": RECIPE, "source": asdict(source), "files": files}
    (folder / SEAL).write_text(json.dumps(seal, indent=2) + "\n", "utf-8")


def _files(folder: Path) -> Iterator[str]:
    """Names of all files in a folder but the seal, relative to it."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SEAL:
            yield name


def _facts(path: Path) -> dict[str, int | str]:
    """Size and checksum of one file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
