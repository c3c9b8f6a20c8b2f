"""A program whose loader process is killed, to see how it ends: `python -m tests.unit.killed_loader worker`.

With `trainer` instead it is killed itself while its loader processes start, after it has printed their numbers.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time

import psutil
from torch.utils.data import Dataset

from listen_dist.data.collate import collate
from listen_dist.data.loader import _batches
from listen_dist.errors import LoaderError
from listen_dist.structures import Batch


class Empty(Dataset[Batch]):
    """Empty batches without end."""

    def __getitem__(self, place: int) -> Batch:
        return collate([], False, [])


def workers() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def kill_trainer() -> None:
    while len(started := workers()) < 2:
        time.sleep(0.001)
    print(*started, flush=True)
    os.kill(os.getpid(), 9)


def main() -> None:
    if sys.argv[1] == "trainer":
        threading.Thread(target=kill_trainer).start()
    batches = _batches(Empty(), itertools.count(), workers=2)  # type: ignore[arg-type]
    next(batches)
    try:
        os.kill(workers()[0], 9)
        for _ in batches:
            pass
    except RuntimeError as error:  # as the trainer does: the news may come by a signal, wherever it just is
        died = LoaderError.of(error)
        if died is None:
            raise
        raise died from error


if __name__ == "__main__":
    main()
