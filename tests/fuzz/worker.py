"""The process that runs cases; it may crash, hang or fill up, and is then replaced.

Reads `kind module seed` a line from stdin, and answers each with a line of JSON on its first stdout.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.fuzz.cases import run_case

GIBIBYTES = 12
"""Of address space on top of what the process starts with."""
FILE_BYTES = 1 << 28


def main() -> None:
    root, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes where the parent keeps the last case's words
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, all_threads=True, chain=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    worlds: dict[str, Any] = {}
    limited = False
    for line in sys.stdin:
        kind, module, seed = line.split()
        os.ftruncate(2, 0)
        if kind not in worlds:
            worlds[kind] = import_module(module).prepare(root)
        if not limited:
            _limit_memory()
            limited = True
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds, hard))
        result = run_case(kind, module, worlds[kind], int(seed), folder)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        answers.write(json.dumps(asdict(result)) + "\n")
        answers.flush()


def _limit_memory() -> None:
    """An allocation beyond it raises MemoryError here instead of ending other programs of the machine."""
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + GIBIBYTES * 2**30, hard))


if __name__ == "__main__":
    main()
