"""Folders on an HTTP server or in an object store: stretches of bytes, got in spite of faults.

`RemoteFolder.stream` is the only loop that retries. A dropped connection, a time-out or a busy server costs
a pause that doubles each time, and the read goes on at the byte it had reached. What no patience mends comes
out as one of two errors: `ShardError` where the file is not what the index says (the sample is skipped and
named), `SourceError` where the source fails or refuses us (the run ends; no sample is lost by it).
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import requests
import urllib3

from listen_dist.data.shard_members import ShardError
from listen_dist.errors import ListenError

_BLOCK = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first retry and at most."""
_PROGRESS = 1 << 20
"""A try that brought so many bytes counts as a success: a large shard may break as often as it likes."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


_retried: Counter[str] = Counter()
"""Tries of this process that failed and were made again, by host, since `take_retries`."""


def take_retries() -> dict[str, int]:
    """How often this process had to try again since the last call, by host."""
    taken = dict(_retried)
    _retried.clear()
    return taken


class SourceError(ListenError):
    """A source that does not answer, or refuses us; names the file and the last cause."""


class MissingFile(ShardError):
    """The source works, but the file is not there."""


class _Fault(Exception):
    """What may pass by itself; says how long the server wants us to wait, in seconds."""

    def __init__(self, cause: str, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.wait = wait


@dataclass(frozen=True)
class PinnedFile:
    """A file as an index pins it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RemoteFolder(ABC):
    """A folder elsewhere. Holds no connection, so it can be pickled and hashed."""

    address: str
    """As the config gives it, without a slash at its end."""
    retries: int
    """Tries in a row that may fail after the first."""
    timeout: float
    """Seconds without a byte after which a try has failed."""

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> str:
        """Where a file lies."""
        return f"{self.address}/{name}"

    @property
    def host(self) -> str:
        """Host and port, or the bucket of a store."""
        return self.address.partition("://")[2].partition("/")[0]

    @abstractmethod
    def _blocks(self, name: str, start: int, end: int | None, total: int | None) -> Iterator[bytes]:
        """One try at bytes `start` to `end` (None: to the end of the file), of `total` in the file if known.

        Raises:
            _Fault, ShardError, SourceError
        """

    def check(self, name: str, size: int | None) -> None:  # noqa: B027
        """Asking for every file at start would take a request each; reading one tells."""

    def stream(self, name: str, start: int, end: int | None, total: int | None) -> Iterator[bytes]:
        """Yield bytes `start` to `end` (None: to the end), going on where a fault cut them off.

        Raises:
            ShardError: the file is missing or not `total` bytes long.
            SourceError: too many tries in a row failed, or the server refuses.
        """
        position, failures = start, 0
        while True:
            began = position
            try:
                for block in self._blocks(name, position, end, total):
                    position += len(block)
                    if end is not None and position > end:
                        raise SourceError(f"{self / name}: the server sends more bytes than it was asked for")
                    yield block
                if end is None or position == end:
                    return
                raise _Fault("the answer ended early")
            except _Fault as fault:
                failures = 1 if position - began >= _PROGRESS else failures + 1
                if failures > self.retries:
                    raise SourceError(f"{self / name}: {failures} tries in a row failed, the last at byte {position}: "
                                      f"{fault}. Start again when the source works; the run goes on from its "
                                      "checkpoint") from None
                _retried[self.host] += 1
                _pause(failures, fault.wait)

    def read_file(self, name: str, limit: int, sha256: str = "") -> bytes:
        """A whole file of at most `limit` bytes; its hash is the caller's to check.

        Raises:
            ShardError, SourceError: as `stream`.
        """
        content = bytearray()
        for block in self.stream(name, 0, None, None):
            content += block
            if len(content) > limit:
                raise ShardError(f"longer than the {limit} bytes it may have")
        return bytes(content)

    def read_range(self, file: PinnedFile, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`.

        Raises:
            ShardError, SourceError: as `stream`.
        """
        return b"".join(self.stream(file.name, offset, offset + size, file.bytes))

    def sha256(self, file: PinnedFile) -> str:
        """The hash of a file's bytes.

        Raises:
            ShardError, SourceError: as `stream`.
        """
        digest = hashlib.sha256()
        for block in self.stream(file.name, 0, file.bytes, file.bytes):
            digest.update(block)
        return digest.hexdigest()


class HttpFolder(RemoteFolder):
    """A folder on an HTTP server. Proxies and passwords come from the environment and ~/.netrc."""

    def _blocks(self, name: str, start: int, end: int | None, total: int | None) -> Iterator[bytes]:
        # identity: ranges count the file's own bytes
        headers = {"Accept-Encoding": "identity"}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            with _session(os.getpid()).get(self / name, headers=headers, stream=True, timeout=self.timeout) as response:
                ahead = self._bytes_ahead(response, name, start, end, total)
                # read1 hands over what has come, so that nothing of it is lost when the connection drops.
                while block := response.raw.read1(_BLOCK):
                    if len(block) > ahead:
                        yield block[ahead:]
                    ahead = max(0, ahead - len(block))
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise _Fault(_innermost(error)) from None
        except requests.RequestException as error:
            raise SourceError(f"{self / name}: {error}") from None

    def _bytes_ahead(self, response: requests.Response, name: str, start: int, end: int | None,
                     total: int | None) -> int:
        """Check the head of an answer; the number of bytes in its body that come before `start`."""
        status = response.status_code
        said = f"HTTP {status} {response.reason}"
        if status in (404, 410):
            raise MissingFile(f"missing ({said}); write it anew with tools/shard_dataset.py or restore it")
        if status == 416:
            raise ShardError(f"cut short: the server has no byte {start} ({said}); copy or write it anew")
        if status in (408, 425, 429) or status >= 500:
            raise _Fault(said, _seconds_to_wait(response))
        if status not in (200, 206):
            raise SourceError(f"{self / name}: {said}; check the address, and the password in ~/.netrc")
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != start:
                raise SourceError(f"{self / name}: the server answers another byte range than it was asked for")
            size = found[3]
        else:
            size = response.headers.get("Content-Length", "*")
        if total is not None and size not in ("*", str(total)):
            raise ShardError(f"{size} bytes long, the index says {total}; copy or write it anew")
        if status == 206:
            return 0
        if end is not None and end != total:
            raise SourceError(f"{self / name}: the server does not honour byte ranges; set data.cache_dir, which "
                              "fetches whole shards, or use another server")
        return start


class StoreFolder(RemoteFolder):
    """A folder in an object store, through fsspec. Keys and endpoints come from the store's own environment."""

    def _blocks(self, name: str, start: int, end: int | None, total: int | None) -> Iterator[bytes]:
        scheme, _, folder = self.address.partition("://")
        store, path = _store(scheme, os.getpid()), f"{folder}/{name}"
        try:
            stop = store.size(path) if end is None else end
            while start < stop:
                block = store.cat_file(path, start=start, end=min(start + 8 * _BLOCK, stop))
                if len(block) < min(8 * _BLOCK, stop - start):
                    raise ShardError(f"cut short at byte {start + len(block)}; copy or write it anew")
                start += len(block)
                yield block
        except FileNotFoundError:
            raise MissingFile("missing; write it anew with tools/shard_dataset.py or restore it") from None
        except ShardError:
            raise
        except PermissionError as error:
            raise SourceError(f"{self / name}: access refused: {error}") from None
        except OSError as error:
            raise _Fault(_innermost(error)) from None
        except Exception as error:  # the stores' clients have many of their own, after retries of their own
            raise SourceError(f"{self / name}: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=1)
def _session(process: int) -> requests.Session:
    """This process's connections; a forked child must not share its parent's."""
    return requests.Session()


@functools.lru_cache
def _store(scheme: str, process: int) -> Any:
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise SourceError(f"{scheme}://: {error}; pip install 'listen_dist[{scheme}]'") from None


def _pause(failures: int, wait: float) -> None:
    """Sleep before try `failures`: doubling, a little random so that many ranks do not come back at once."""
    pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1)) * random.Random().uniform(0.75, 1.0)
    time.sleep(max(pause, min(wait, _LONGEST_PAUSE)))


def _seconds_to_wait(response: requests.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _innermost(error: BaseException) -> str:
    """The message of the first cause: libraries wrap it several times."""
    while isinstance(inner := error.__cause__ or error.__context__, BaseException):
        error = inner
    return f"{type(error).__name__}: {error}"
