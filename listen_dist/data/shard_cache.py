"""Whole shards of a remote folder on a local disk, shared by all processes of a node.

A file is called by its sha256, so the cache needs no list, two addresses of one shard share it, and what it
holds is right by construction: a download gets its name only when its hash agrees. One process downloads,
the others wait for it; one that was killed leaves a part behind, where the next goes on.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from listen_dist.data.manifest import atomic_file, file_sha256
from listen_dist.data.remote import PinnedFile, RemoteFolder, SourceError
from listen_dist.data.shard_members import ShardError

_ABANDONED = 3600.0
"""Seconds after which a part that nobody wrote to may be dropped."""

# Shards that came with another hash, by the hash they should have: not worth a download for each of their samples.
_refused: dict[str, str] = {}


@dataclass(frozen=True)
class CachedFolder:
    """A remote folder whose shards and sidecars are read from local copies."""

    remote: RemoteFolder
    cache: Path
    limit: int
    """Bytes. The shards used longest ago make room for a new one; those being downloaded stay."""

    def __str__(self) -> str:
        return str(self.remote)

    def __truediv__(self, name: str) -> str:
        """Where a file lies."""
        return self.remote / name

    def check(self, name: str, size: int | None) -> None:
        """Refuse a shard that the cache has no room for.

        Raises:
            ShardError
        """
        if size is not None and size > self.limit:
            raise ShardError(f"{self / name}: {size / 2**30:.2f} GiB, more than data.cache_gib = "
                             f"{self.limit / 2**30:g} has room for; give it more, or write smaller shards")

    def read_file(self, name: str, limit: int, sha256: str = "") -> bytes:
        """A whole small file; one whose hash is known is kept.

        Raises:
            ShardError, SourceError: as `RemoteFolder.stream`.
        """
        copy = self.cache / f"{sha256}.json"
        try:
            if sha256 and hashlib.sha256(content := copy.read_bytes()).hexdigest() == sha256:
                os.utime(copy)
                return content
        except OSError:
            pass  # not there yet
        content = self.remote.read_file(name, limit, sha256)
        if hashlib.sha256(content).hexdigest() == sha256:
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                with atomic_file(copy) as file:
                    file.write(content)
            except OSError as error:
                raise self._unusable(error) from None
        return content

    def read_range(self, file: PinnedFile, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of a shard, which is fetched whole when it is not here.

        Raises:
            ShardError: the shard is missing, or its bytes are not those the index was written for.
            SourceError: the source fails, or nothing can be written here.
        """
        copy = self.cache / f"{file.sha256}.tar"
        try:
            while True:
                try:
                    with copy.open("rb") as here:
                        os.utime(here.fileno())  # used now: the last to be dropped
                        if os.fstat(here.fileno()).st_size == file.bytes:
                            return os.pread(here.fileno(), size, offset)
                    copy.unlink(missing_ok=True)
                except FileNotFoundError:
                    self._fetch(file, copy)
        except OSError as error:
            raise self._unusable(error) from None

    def sha256(self, file: PinnedFile) -> str:
        """The hash of the file at the source, not of the copy.

        Raises:
            ShardError, SourceError: as `RemoteFolder.stream`.
        """
        return self.remote.sha256(file)

    def _fetch(self, file: PinnedFile, copy: Path) -> None:
        if file.sha256 in _refused:
            raise ShardError(_refused[file.sha256])
        self.cache.mkdir(parents=True, exist_ok=True)
        # A lock for 1/256 of all hashes, so that the lock files do not pile up.
        with FileLock(self.cache / f"{file.sha256[:2]}.lock"):
            if copy.exists():  # another process was faster
                return
            # The name holds the size it will have, for those who count how full the cache is.
            part = self.cache / f"{file.sha256}.{file.bytes}.part"
            if part.exists() and part.stat().st_size > file.bytes:
                part.unlink()
            with part.open("ab") as out:
                self._make_room()
                for block in self.remote.stream(file.name, out.tell(), file.bytes, file.bytes):
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            if file_sha256(part) != file.sha256:
                part.unlink()
                _refused[file.sha256] = "its sha256 differs from the index; copy or write it anew"
                raise ShardError(_refused[file.sha256])
            os.replace(part, copy)

    def _make_room(self) -> None:
        """Drop the copies used longest ago until all fit (a part counts as what it will be)."""
        with FileLock(self.cache / "room.lock"):
            found = [state for path in self.cache.iterdir() if (state := _state(path))]
            held = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if held <= self.limit:
                    return
                if path.suffix != ".part" or time.time() - used > _ABANDONED:
                    path.unlink(missing_ok=True)
                    held -= size

    def _unusable(self, error: OSError) -> SourceError:
        return SourceError(f"data.cache_dir = {str(self.cache)!r}: {error.strerror or error}; it needs a folder on "
                           "this node's disk that can be written to")


def _state(path: Path) -> tuple[float, int, Path] | None:
    """When a file of the cache was last used, and its final size; None where it is another's or just went."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    if path.suffix in (".tar", ".json"):
        return state.st_mtime, state.st_size, path
    return (state.st_mtime, int(path.suffixes[0][1:]), path) if path.suffix == ".part" else None
