"""How every program of the package and of tools/ ends: its exit code and its last line.

docs/cluster.md explains the codes. Nothing heavy is imported, so that `--help` is answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor

from listen_dist.errors import ListenError, LoaderError

FAULT = 1
"""A fault of ours, with its traceback."""
MISTAKE = 2
"""A mistake of the user, or a state of the surroundings: one line names it."""
RESUMABLE = os.EX_TEMPFAIL
"""75: stopped on request; the same command goes on from the last checkpoint."""
LOST_CONTACT = os.EX_PROTOCOL
"""76: another rank died or did not answer in time; starting again may help."""


def run(work: Callable[[], int | None], memory_cure: str = "Take smaller batches or models, or more memory") -> int:
    """Do all of a program's work, the reading of its arguments included.

    A fault of ours goes on as the exception it is, behind the line that the batch scripts look for.

    Args:
        memory_cure: what to change where memory runs out.

    Returns:
        the exit code, 0 where `work` returns None.
    """
    try:
        return work() or 0
    except Exception as error:
        code, words = ending(error, memory_cure)
        print(f"error: {words}", file=sys.stderr, flush=True)
        if code == FAULT:
            raise
        return code


def ending(error: Exception, memory_cure: str) -> tuple[int, str]:
    """The exit code that an exception means, and what to say."""
    if isinstance(error, ListenError | OSError):
        return MISTAKE, str(error)
    if _is_out_of_memory(error):
        return MISTAKE, f"{str(error).partition(chr(10))[0] or 'out of memory'} {memory_cure}"
    if died := LoaderError.of(error):
        return MISTAKE, str(died)
    if isinstance(error, BrokenExecutor):
        return MISTAKE, "a worker process died (out of memory?); run again with fewer --workers to go on"
    if _is_lost_contact(error):
        return LOST_CONTACT, f"a collective failed ({str(error).partition(chr(10))[0]})"
    return FAULT, f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return (isinstance(error, MemoryError) or torch is not None and isinstance(error, torch.OutOfMemoryError)
            or "DefaultCPUAllocator: can't allocate memory" in str(error))


def _is_lost_contact(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from listen_dist import dist

    return dist.lost_contact(error)
