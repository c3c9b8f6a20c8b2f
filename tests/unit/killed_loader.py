"""A program whose loader process is killed, to see how it ends: `python -m tests.unit.killed_loader`."""

from __future__ import annotations

import itertools
import os

import psutil
from torch.utils.data import Dataset

from listen_dist.data.collate import collate
from listen_dist.data.loader import LoaderError, _batches
from listen_dist.structures import Batch


class Empty(Dataset[Batch]):
    """Empty batches without end."""

    def __getitem__(self, place: int) -> Batch:
        return collate([], False, [])


def main() -> None:
    batches = _batches(Empty(), itertools.count(), workers=2)  # type: ignore[arg-type]
    next(batches)
    victim = next(child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
    try:
        os.kill(victim.pid, 9)
        for _ in batches:
            pass
    except RuntimeError as error:  # as the trainer does: the news may come by a signal, wherever it just is
        died = LoaderError.of(error)
        if died is None:
            raise
        raise died from error


if __name__ == "__main__":
    main()
