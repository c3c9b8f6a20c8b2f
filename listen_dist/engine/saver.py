"""Checkpoints written while training goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from listen_dist.engine import checkpoint
from listen_dist.engine.checkpoint import CheckpointError, Snapshot

logger = logging.getLogger(__name__)


class Saver:
    """A thread a checkpoint, one at a time; rank 0 only.

    A checkpoint that cannot be written (disk full, no permission) is said, counted and left out: the
    ones before it stay, and the next one is tried as usual. Only the last of a run must not fail.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.failed = 0
        """Checkpoints that could not be written."""

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; waits first for the one before, where that is still being written."""
        self.wait()
        # Not a daemon: a run that ends by an exception still finishes what it had begun to save.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the thread; raise what went wrong in it, if it was not a matter of the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written; the message names the folder and the cause.
        """
        self.wait()
        if self._error is not None:
            raise CheckpointError(f"{self._folder}: the last checkpoint could not be written ({self._error}); "
                                  "make room and start the same command again, it goes on from the one before")

    def _write(self, snapshot: Snapshot) -> None:
        self._error = None
        try:
            logger.info("saved %s", checkpoint.write(self._folder, snapshot))
        except OSError as error:
            self._error = error
            self.failed += 1
            logger.warning("%s: the checkpoint of step %d could not be written (%s); the ones before it stay, and "
                           "training goes on", self._folder, snapshot.state.step, error)
        except BaseException as error:  # a fault of the program, raised by `wait`
            self._error = error
