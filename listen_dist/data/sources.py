"""Where shards lie: one folder or several, here or elsewhere. The one place that turns an address into a reader.

    /data/asr/train                      a local or shared folder
    https://host/asr/train               a folder on an HTTP server; each sample is one range request
    s3://bucket/asr/train, gs://…        an object store, through fsspec
    /data/part-{00..07}, {/a,s3://b/c}   several folders, read as one set

Addresses come from the configuration only; what an index names are plain file names within its folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from listen_dist.config import set_addresses
from listen_dist.data.manifest import file_sha256
from listen_dist.data.remote import HttpFolder, MissingFile, PinnedFile, RemoteFolder, StoreFolder
from listen_dist.data.shard_cache import CachedFolder
from listen_dist.data.shard_members import ShardError
from listen_dist.schema import DataConfig


class Folder(Protocol):
    """A folder of files. Small to pickle, hashable, without an open file. `str()` is its address.

    A `ShardError` of these methods does not name the file: that is left to the caller.
    """

    def __hash__(self) -> int: ...

    def __truediv__(self, name: str) -> object:
        """Where a file lies, for messages."""

    def check(self, name: str, size: int | None) -> None:
        """Refuse at start, where it is cheap to tell: a file that is missing or of another size.

        Raises:
            ShardError: this one names the file.
        """

    def read_file(self, name: str, limit: int, sha256: str = "") -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:
            ShardError: it is missing or longer.
            SourceError: the source fails.
        """

    def read_range(self, file: PinnedFile, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of a shard.

        Raises:
            ShardError: it is missing or shorter.
            SourceError: the source fails.
        """

    def sha256(self, file: PinnedFile) -> str:
        """The hash of a file's bytes.

        Raises:
            ShardError, SourceError: as `read_range`.
        """


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine's file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        """Where a file lies."""
        return self.path / name

    def check(self, name: str, size: int | None) -> None:
        """Refuse a file that is missing or of another size.

        Raises:
            ShardError
        """
        path = self.path / name
        try:
            found = path.stat().st_size
        except OSError:
            raise ShardError(
                f"{path}: missing; write it anew with tools/shard_dataset.py or restore it"
            ) from None
        if size is not None and found != size:
            state = "cut short" if found < size else "too long"
            raise ShardError(f"{path}: {state}: {found} bytes, the index says {size}; copy or write it anew")

    def read_file(self, name: str, limit: int, sha256: str = "") -> bytes:
        """A whole file of at most `limit` bytes.

        Raises:
            ShardError: it is missing, longer, or can't be read.
        """
        try:
            with (self.path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                # As much as is there: a read reserves what it is asked for.
                content = file.read(size) if size <= limit else None
        except FileNotFoundError:
            raise MissingFile("missing; write the shard anew or restore it") from None
        except OSError as error:
            raise ShardError(f"can't be read ({error.strerror}); write the shard anew or restore it") from None
        if content is None:
            raise ShardError(f"longer than the {limit} bytes it may have")
        return content

    def read_range(self, file: PinnedFile, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`.

        Raises:
            ShardError: the file can't be opened, or ends before.
        """
        try:
            descriptor = os.open(f"{self.path}/{file.name}", os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"the shard can't be opened ({error.strerror}); restore it") from None
        try:
            block = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"the shard can't be read ({error.strerror}); restore it") from None
        finally:
            os.close(descriptor)
        if len(block) != size:
            raise ShardError(f"the shard is cut short at byte {offset + len(block)}; copy or write it anew")
        return block

    def sha256(self, file: PinnedFile) -> str:
        """The hash of a file's bytes."""
        return file_sha256(self.path / file.name)


@dataclass(frozen=True)
class JoinedFolder:
    """Several folders as one: file `3/shard-000000.tar` is `shard-000000.tar` of the fourth."""

    address: str
    parts: tuple[Folder, ...]

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> object:
        """Where a file lies."""
        part, rest = locate(self, name)
        return part / rest


def locate(folder: Folder | JoinedFolder, name: str) -> tuple[Folder, str]:
    """The single folder that holds a file, and the file's name there."""
    if not isinstance(folder, JoinedFolder):
        return folder, name
    number, _, rest = name.partition("/")
    return folder.parts[int(number)], rest


def hosts_of(path: str) -> list[str]:
    """The hosts and buckets that a set's path names; none where all of it is here."""
    folders = (open_folder(address, DataConfig()) for address in set_addresses(path))
    return [folder.host for folder in folders if isinstance(folder, RemoteFolder)]


def open_folder(address: str, data: DataConfig) -> Folder:
    """The reader of one address (no braces). Nothing is opened yet."""
    scheme, separator, _ = address.partition("://")
    if not separator:
        return LocalFolder(Path(address))
    kind = HttpFolder if scheme in ("http", "https") else StoreFolder
    remote: RemoteFolder = kind(address.rstrip("/"), data.retries, data.timeout_seconds)
    if not data.cache_dir:
        return remote
    return CachedFolder(remote, Path(data.cache_dir), int(data.cache_gib * 2**30))
