"""One run in a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from listen_dist.schema import ConfigError

logger = logging.getLogger(__name__)

PATIENCE = 180.0
"""Seconds to wait for the lock of the same Slurm job, which was requeued after its node was lost: a shared file
system gives up a dead machine's lock only after a while (NFS: 90 s)."""


class RunLock:
    """Holds a lock file in `folder`; rank 0 only.

    It is a POSIX lock, which NFS, Lustre and GPFS keep across machines and which goes when its
    process does, however that ends. The text in the file only says who holds it.

    Raises:
        ConfigError: another run holds it; the message names its host and process.
    """

    def __init__(self, folder: Path, name: str = "lock", key: str = "run_dir") -> None:
        self._file = (folder / name).open("ab+", buffering=0)
        job = os.environ.get("SLURM_JOB_ID", "")
        deadline = time.monotonic() + PATIENCE
        while not self._try():
            holder = self._holder()
            if not job or holder.get("job") != job or time.monotonic() > deadline:
                self._file.close()
                raise ConfigError(f"{key} = {str(folder)!r}: in use by process {holder.get('pid', '?')} on "
                                  f"{holder.get('host', 'an unknown host')}, running since {holder.get('since', '?')}; "
                                  f"wait for its end, or choose another {key}")
            time.sleep(2)
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "job": job,
                     "since": time.strftime("%Y-%m-%d %H:%M:%S")})

    def release(self) -> None:
        if not self._file.closed:
            self._write({})
            self._file.close()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logger.warning("%s: this file system keeps no locks (%s); nothing stops a second run in this folder",
                           self._file.name, error.strerror)
        return True

    def _holder(self) -> dict[str, object]:
        self._file.seek(0)
        try:
            return dict(json.loads(self._file.read()))
        except ValueError:  # it is writing its name just now
            return {}

    def _write(self, holder: dict[str, object]) -> None:
        try:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(holder).encode() if holder else b"")
        except OSError as error:  # a full disk: the lock itself holds
            logger.warning("%s: %s", self._file.name, error)
