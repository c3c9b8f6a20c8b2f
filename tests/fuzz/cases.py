"""One case: run it, and tell what is a fault."""

from __future__ import annotations

import os
import random
import shutil
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from listen_dist.errors import ListenError

KINDS = {name: f"tests.fuzz.{name}" for name in ("audio", "shards", "manifests", "tables", "configs", "page")}
OURS = ("/listen_dist/", "/tools/")
MOST_MEBIBYTES = 1200
"""More than this on top of what a process held before a case is a fault; a 30 s clip of 64 channels takes 370."""
PERTURB, MMAP_THRESHOLD = -6, -3
"""Of mallopt. What is mapped instead comes as zeros, so nearly nothing may be."""


class Fault(AssertionError):
    """What ran gave something wrong."""


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    kind: str
    seed: int
    outcome: str
    """A word; "fault" where something is wrong."""
    cause: str = ""
    """Of a fault: the same for all inputs that meet the same line of code."""
    detail: str = ""
    """Of a fault: the traceback."""
    mebibytes: int = 0
    """What the process holds in memory after it."""


def run_case(kind: str, module: str, world: Any, seed: int, folder: Path) -> Result:
    """Run one case in an empty folder. The folder is removed unless there is a fault."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _reset_peak()
    before = memory("VmRSS")
    try:
        outcome = import_module(module).case(world, random.Random(f"{kind}/{seed}"), folder)
        grown = memory("VmHWM") - before
        if grown > MOST_MEBIBYTES:
            raise Fault(f"takes {grown} MiB")
    except ListenError as error:
        message = str(error)
        if message.strip() and "\n" not in message.strip():
            outcome = "refused"
        else:
            return _fault(kind, seed, error, f"{type(error).__name__} of {message.count(chr(10)) + 1} lines")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, MemoryError: also faults
        return _fault(
            kind, seed, error, f"{type(error).__name__}: {error}" if isinstance(error, Fault) else type(error).__name__
        )
    shutil.rmtree(folder, ignore_errors=True)
    return Result(kind, seed, outcome, mebibytes=memory("VmRSS"))


def one_line(error: BaseException, *names: str) -> None:
    """Check the message of a refusal: one line that names the place.

    Raises:
        Fault
    """
    message = str(error).strip()
    if not message or "\n" in message:
        raise Fault(f"{type(error).__name__} of {len(message.splitlines())} lines") from error
    if names and not any(name in message for name in names):
        raise Fault(f"{type(error).__name__} that names neither file nor sample") from error


def memory(key: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) // 1024
    return 0


def poison(byte: int) -> None:
    """Fill what malloc hands out with a byte, so that what reads it unwritten gives something else each time."""
    try:
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 1 << 25)
        mallopt(PERTURB, byte)
    except (OSError, AttributeError):  # another C library
        pass


def _fault(kind: str, seed: int, error: BaseException, what: str) -> Result:
    detail = "".join(traceback.format_exception(error))
    return Result(kind, seed, "fault", f"{what.splitlines()[0][:160]}{_place(error)}", detail[-6000:], memory("VmRSS"))


def _place(error: BaseException) -> str:
    """The deepest line of the package or its tools that an error came through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(part in frame.filename for part in OURS) and "site-packages" not in frame.filename
    ]
    return f" at {os.path.relpath(frames[-1].filename)}:{frames[-1].name}" if frames else ""


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # no such file, or not allowed: then VmHWM is the process's
        pass
