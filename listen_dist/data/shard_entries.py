"""The entries of an index, in columns: 100,000 shards take tens of megabytes, and pickle at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from listen_dist.data.remote import PinnedFile


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the index tells it."""

    name: str
    samples: int
    bytes: int
    """Size of the tar."""
    seconds: float
    """Audio in it."""
    sha256: str
    samples_sha256: str
    """Hash of the sidecar."""
    tasks: dict[str, int]
    """Samples of each task."""

    @property
    def sidecar(self) -> str:
        """Name of the file with the columns."""
        return self.name.removesuffix(".tar") + ".samples.json"

    @property
    def tar(self) -> PinnedFile:
        """The shard as a file."""
        return PinnedFile(self.name, self.bytes, self.sha256)


class ShardEntries(Sequence[ShardEntry]):
    """A sequence of entries that holds columns and makes an entry when it is asked for."""

    def __init__(self, entries: Iterable[ShardEntry]) -> None:
        rows = list(entries)
        self.samples = np.array([row.samples for row in rows], dtype=np.int64)
        self._bytes = np.array([row.bytes for row in rows], dtype=np.int64)
        self._seconds = np.array([row.seconds for row in rows], dtype=np.float64)
        # As wide as the longest; the index was checked to hold short names and hashes of 64 characters.
        self._text = {key: np.array([getattr(row, key).encode() for row in rows], dtype=np.bytes_)
                      for key in ("name", "sha256", "samples_sha256")}
        self._tasks = [row.tasks for row in rows]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, place: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, place: slice) -> list[ShardEntry]: ...

    def __getitem__(self, place: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        name, sha256, samples_sha256 = (column[place].decode() for column in self._text.values())
        return ShardEntry(name, int(self.samples[place]), int(self._bytes[place]), float(self._seconds[place]), sha256,
                          samples_sha256, self._tasks[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardEntries) and len(self) == len(other) and all(map(ShardEntry.__eq__, self, other))

    def __hash__(self) -> int:
        return hash((len(self), int(self.samples.sum())))
