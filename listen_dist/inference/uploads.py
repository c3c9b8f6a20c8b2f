"""Recordings that a browser sent: files in one temporary folder, found by a random name that the server gave."""

from __future__ import annotations

import re
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from listen_dist.errors import ListenError

MOST_CLIPS = 64
"""The oldest goes when more come, so that the folder stays of bounded size."""
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
"""Kept: of formats without a header the name alone tells which it is, here as in the shell."""


class TooLarge(ListenError):
    """More bytes than allowed; the message says how many those are."""


@dataclass(frozen=True)
class Upload:
    """A received file."""

    path: Path
    name: str
    """What the sender calls it; shown, and never used as a path."""


class Uploads:
    """The folder and what is in it. Safe for use from several threads.

    Args:
        most_bytes: of one file.
    """

    def __init__(self, most_bytes: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="listen_dist-")
        self._most_bytes = most_bytes
        self._known: dict[str, Upload] = {}  # in the order of arrival
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    async def receive(self, name: str, blocks: AsyncIterator[bytes]) -> str:
        """Write a file; the name it can be asked for by.

        Raises:
            TooLarge: nothing of it is kept.
        """
        key = secrets.token_urlsafe(16)
        suffix = Path(name).suffix.lower()
        upload = Upload(self.folder / f"{key}{suffix if _SUFFIX.fullmatch(suffix) else ''}", name)
        size = 0
        try:
            with upload.path.open("wb") as file:
                async for block in blocks:
                    size += len(block)
                    if size > self._most_bytes:
                        raise TooLarge(f"larger than the limit of {self._most_bytes / 2**20:g} MB")
                    file.write(block)
        except BaseException:  # the sender may also have gone away
            upload.path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._known[key] = upload
            surplus = list(self._known)[:-MOST_CLIPS]
        for old in surplus:
            self.drop(old)
        return key

    def get(self, key: str) -> Upload | None:
        """A received file, or None where there is none of that name (any more)."""
        with self._lock:
            return self._known.get(key)

    def drop(self, key: str) -> None:
        with self._lock:
            upload = self._known.pop(key, None)
        if upload:
            upload.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()
