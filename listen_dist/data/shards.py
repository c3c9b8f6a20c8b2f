"""Shards as they are read: `index.json`, the sidecars, and one sample by one read (how: sources.py).

A folder of shards (written by `shard_writer.py`) holds

    index.json                  what there is: a list of shards with counts, bytes, seconds, hashes
    shard-000000.tar            plain WebDataset: <id>.flac, <id>.json, perhaps <id>.speech.npy, <id>.audio.npy
    shard-000000.samples.json   columns, one row a sample: id, byte range in the tar, seconds, task, text length

so that any sample is one seek and one read, and the order of samples can be planned without opening a tar.
Everything read here counts as untrusted: nothing is unpickled, no name from a file is used as a path
before it is checked, and sizes are compared with what is on disk before memory is reserved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from listen_dist.config import set_addresses
from listen_dist.data.decode import AudioError
from listen_dist.data.manifest import ManifestError, check_id
from listen_dist.data.remote import MissingFile, PinnedFile
from listen_dist.data.shard_entries import ShardEntries, ShardEntry
from listen_dist.data.shard_members import PackedSample, ShardError, Want, decode_sample, unpack_sample
from listen_dist.data.sources import Folder, JoinedFolder, locate, open_folder
from listen_dist.schema import DataConfig
from listen_dist.structures import AudioSample

FORMAT_VERSION = 1
FEATURES_VERSION = 2
"""How frames are made. 2: by the encoder in fp32, from the samples as the shard holds them. 1, which says nothing of
itself: in any type, from samples before they were rounded to 16 bits, and perhaps from memory that was never filled."""
INDEX_NAME = "index.json"
MOST_CHECKED = 10_000
"""Shards whose size is compared with the index at start; all of them in a set of up to so many."""
CHECK_THREADS = 16

_MAX_INDEX_BYTES = 1 << 28
"""Some 700,000 shards."""
_MAX_ROW_BYTES = 1024
"""Of a sidecar: an id, a task and four numbers take some 150."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,199}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COLUMNS = {"id": str, "offset": int, "bytes": int, "seconds": float, "task": str, "text_chars": int}


@dataclass(frozen=True)
class FeatureInfo:
    """Which frozen encoder made the stored features."""

    fingerprint: str
    width: int
    """E, the width of a frame."""
    rate: int
    """Frames a second."""
    version: int = FEATURES_VERSION


@dataclass(frozen=True)
class SampleTable:
    """The columns of one shard, a row a sample."""

    ids: list[str]
    offset: np.ndarray  # int64 [rows], start of the sample's members in the tar
    bytes: np.ndarray  # int64 [rows], length of the range that covers all its members
    seconds: np.ndarray  # float64 [rows]
    tasks: np.ndarray  # str [rows]
    text_chars: np.ndarray  # int64 [rows], characters of target and instruction

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards. Small to pickle, safe to share between processes: it holds no open file."""

    folder: Folder | JoinedFolder
    shards: ShardEntries
    samples: int
    seconds: float
    tasks: dict[str, int]
    languages: dict[str, int]
    skipped: int
    features: FeatureInfo | None
    """Of the speech encoder; None: nothing is stored."""
    audio_features: FeatureInfo | None = None
    """Of the audio encoder, where its frames are stored beside the speech encoder's."""

    @staticmethod
    def load(path: str | os.PathLike[str], data: DataConfig = DataConfig(),  # noqa: B008
             check_files: bool = True) -> ShardIndex:
        """Read and check the `index.json` of a folder, and in a local one the size of the shards.

        Of more than MOST_CHECKED shards, every second (third …) is looked at; one that is cut short shows when read.

        Args:
            path: what `data.train[i].path` may be (see sources.py); several folders are read as one set.
            data: how to read from elsewhere: the cache, retries, time-out.
            check_files: False reads the index alone.

        Raises:
            ConfigError: no address that we read.
            ShardError: a file is missing, cut short, or disagrees with the index; names it and the cure.
            SourceError: the source fails.
        """
        indexes = [_load_folder(open_folder(address, data), check_files)
                   for address in set_addresses(os.fspath(path))]
        return indexes[0] if len(indexes) == 1 else _join(os.fspath(path), indexes)

    @property
    def counts(self) -> np.ndarray:
        """Samples of each shard, int64 [shards]."""
        return self.shards.samples

    @property
    def fingerprint(self) -> str:
        """Hash over all shards' hashes: equal means equal bytes."""
        hashes = "".join(shard.sha256 + shard.samples_sha256 for shard in self.shards)
        return hashlib.sha256(hashes.encode()).hexdigest()

    def shard_table(self, shard: int) -> SampleTable:
        """Return the columns of shard number `shard` (read when first asked for, the latest few kept).

        Raises:
            ShardError: the sidecar is missing, damaged, or disagrees with the index.
        """
        return self._table(self.shards[shard])

    def _table(self, entry: ShardEntry) -> SampleTable:
        folder, name = locate(self.folder, entry.sidecar)
        return _read_table(folder, name, entry.samples_sha256, entry.samples, entry.bytes)

    def read_sample(
        self, shard: int, row: int, want: Want = "audio", max_seconds: float = 60.0
    ) -> AudioSample:
        """Read one sample: its record, and as wanted the waveform and/or the stored features.

        Raises:
            ShardError: anything about the sample or its shard is wrong.
            SourceError: the source fails.
        """
        return self.decode_sample(shard, row, self.fetch_sample(shard, row), want, max_seconds)

    def fetch_sample(self, shard: int, row: int) -> PackedSample:
        """Read one sample and parse its record; its audio stays encoded.

        Raises:
            ShardError, SourceError: as `read_sample`.
        """
        entry = self.shards[shard]
        table = self._table(entry)
        folder, name = locate(self.folder, entry.name)
        try:
            block = folder.read_range(PinnedFile(name, entry.bytes, entry.sha256), int(table.offset[row]),
                                      int(table.bytes[row]))
            return unpack_sample(block, table.ids[row])
        except (ShardError, ManifestError) as error:
            raise self._named(error, shard, row) from None

    def decode_sample(self, shard: int, row: int, packed: PackedSample, want: Want, max_seconds: float) -> AudioSample:
        """Decode what `fetch_sample` gave.

        Raises:
            ShardError: the audio or the features are not as they should be.
        """
        try:
            return decode_sample(packed, want, max_seconds, self._feature_widths)
        except (ShardError, AudioError) as error:
            raise self._named(error, shard, row) from None

    @property
    def _feature_widths(self) -> dict[str, int]:
        kinds = {"speech": self.features, "audio": self.audio_features}
        return {kind: info.width for kind, info in kinds.items() if info}

    def _named(self, error: Exception, shard: int, row: int) -> ShardError:
        folder, name = locate(self.folder, self.shards[shard].name)
        return ShardError(f"{folder / name}: sample {self.shard_table(shard).ids[row]!r}: {error}")

    def verify(self) -> None:
        """Compare the hash of every shard and sidecar with the index.

        Raises:
            ShardError: the first file that differs.
        """
        for number, entry in enumerate(self.shards):
            self.shard_table(number)
            folder, name = locate(self.folder, entry.name)
            if folder.sha256(replace(entry.tar, name=name)) != entry.sha256:
                raise ShardError(f"{folder / name}: sha256 differs from the index; write it anew")


def _load_folder(folder: Folder, check_files: bool) -> ShardIndex:
    where = str(folder / INDEX_NAME)
    try:
        text = folder.read_file(INDEX_NAME, _MAX_INDEX_BYTES)
    except MissingFile:
        raise ShardError(f"{where}: no such index; write shards with tools/shard_dataset.py") from None
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from None
    index = _index_from_json(folder, _load_json(where, text))
    if check_files:
        with ThreadPool(CHECK_THREADS) as pool:  # on a shared folder each look takes a round trip
            pool.map(partial(_check_files, folder), index.shards[:: -(-len(index.shards) // MOST_CHECKED)])
    return index


def _check_files(folder: Folder, entry: ShardEntry) -> None:
    folder.check(entry.name, entry.bytes)
    folder.check(entry.sidecar, None)


def _join(address: str, indexes: list[ShardIndex]) -> ShardIndex:
    """Several folders as one set, their shards one after the other."""
    first = indexes[0]
    for index in indexes:
        if (index.features, index.audio_features) != (first.features, first.audio_features):
            raise ShardError(f"{index.folder}: its stored features are not of the encoder, or the version of "
                             f"tools/shard_dataset.py, that made those of {first.folder}; write one of them anew, or "
                             "give each a set of its own")
    return ShardIndex(
        folder=JoinedFolder(address, tuple(locate(index.folder, "")[0] for index in indexes)),
        shards=ShardEntries(replace(shard, name=f"{number}/{shard.name}")
                     for number, index in enumerate(indexes) for shard in index.shards),
        samples=sum(index.samples for index in indexes),
        seconds=sum(index.seconds for index in indexes),
        tasks=dict(sum((Counter(index.tasks) for index in indexes), Counter())),
        languages=dict(sum((Counter(index.languages) for index in indexes), Counter())),
        skipped=sum(index.skipped for index in indexes),
        features=first.features,
        audio_features=first.audio_features,
    )


def _index_from_json(folder: Folder, data: Any) -> ShardIndex:
    where = file = str(folder / INDEX_NAME)
    version = _get(data, "format_version", int, where)
    if version != FORMAT_VERSION:
        raise ShardError(f"{file}: key 'format_version': {version}, this code reads {FORMAT_VERSION}")
    rows = _get(data, "shards", list, where)
    entries = [_entry_from_json(row, f"{file}: shards[{i}]") for i, row in enumerate(rows)]
    if not entries:
        raise ShardError(f"{file}: key 'shards' is empty")
    if len({entry.name for entry in entries}) != len(entries):
        raise ShardError(f"{file}: key 'shards': a name comes twice")
    index = ShardIndex(
        folder=folder,
        shards=ShardEntries(entries),
        samples=_get(data, "samples", int, where),
        seconds=_get(data, "seconds", float, where),
        tasks=_counts(data, "tasks", where),
        languages=_counts(data, "languages", where),
        skipped=_get(data, "skipped", int, where),
        features=_features_from_json(data.get("features"), "speech", where),
        audio_features=_features_from_json(data.get("features"), "audio", where),
    )
    totals: Counter[str] = Counter()
    for entry in entries:
        totals.update(entry.tasks)
    if index.samples != sum(entry.samples for entry in entries) or index.tasks != dict(totals):
        raise ShardError(f"{file}: keys 'samples' and 'tasks' are not the sums over 'shards'; write it anew")
    return index


def _entry_from_json(data: Any, where: str) -> ShardEntry:
    entry = ShardEntry(
        name=_get(data, "name", str, where),
        samples=_get(data, "samples", int, where),
        bytes=_get(data, "bytes", int, where),
        seconds=_get(data, "seconds", float, where),
        sha256=_get(data, "sha256", str, where),
        samples_sha256=_get(data, "samples_sha256", str, where),
        tasks=_counts(data, "tasks", where),
    )
    if not _SHARD_NAME.fullmatch(entry.name):
        raise ShardError(f"{where}: key 'name': {entry.name[:100]!r} is not a plain name that ends in .tar")
    if not _SHA256.fullmatch(entry.sha256) or not _SHA256.fullmatch(entry.samples_sha256):
        raise ShardError(f"{where}: keys 'sha256' and 'samples_sha256' must be 64 hexadecimal digits")
    if entry.samples < 1 or entry.samples != sum(entry.tasks.values()):
        raise ShardError(f"{where}: key 'samples': {entry.samples} is not the sum over 'tasks'")
    return entry


def _features_from_json(data: Any, kind: str, where: str) -> FeatureInfo | None:
    if data is None or (kind == "audio" and isinstance(data, dict) and kind not in data):
        return None
    info = _get(data, kind, dict, f"{where}: features")
    where = f"{where}: features.{kind}"
    return FeatureInfo(
        _get(info, "fingerprint", str, where),
        _get(info, "width", int, where),
        _get(info, "rate", int, where),
        _get(info, "version", int, where) if "version" in info else 1,
    )


# A table of a 600 s shard takes about 60 kB, so this many stay well under 32 MB.
@lru_cache(maxsize=512)
def _read_table(folder: Folder, name: str, sha256: str, samples: int, tar_bytes: int) -> SampleTable:
    path = str(folder / name)
    try:
        text = folder.read_file(name, 4096 + _MAX_ROW_BYTES * samples, sha256)
    except ShardError as error:
        raise ShardError(f"{path}: {error}") from None
    if hashlib.sha256(text).hexdigest() != sha256:
        raise ShardError(f"{path}: sha256 differs from the index; write the shard anew")
    data = _load_json(path, text)
    columns: dict[str, list[Any]] = {}
    for key, kind in _COLUMNS.items():
        columns[key] = _get(data, key, list, path)
        if len(columns[key]) != samples:
            raise ShardError(f"{path}: key {key!r}: {len(columns[key])} rows, the index says {samples}")
        if not all(_is_a(value, kind) for value in columns[key]):
            raise ShardError(f"{path}: key {key!r}: expected only {kind.__name__}")
    table = SampleTable(
        ids=columns["id"],
        offset=np.array(columns["offset"], dtype=np.int64),
        bytes=np.array(columns["bytes"], dtype=np.int64),
        seconds=np.array(columns["seconds"], dtype=np.float64),
        tasks=np.array(columns["task"], dtype=np.str_),
        text_chars=np.array(columns["text_chars"], dtype=np.int64),
    )
    _check_table(path, table, tar_bytes)
    return table


def _check_table(path: str, table: SampleTable, tar_bytes: int) -> None:
    if len(set(table.ids)) != len(table.ids):
        raise ShardError(f"{path}: key 'id': an id comes twice")
    try:
        for name in table.ids:
            check_id(name)
    except ManifestError as error:
        raise ShardError(f"{path}: {error}") from None
    end = table.offset + table.bytes
    if (table.offset < 0).any() or (table.bytes <= 0).any() or (end > tar_bytes).any():
        raise ShardError(f"{path}: keys 'offset' and 'bytes' reach outside the tar")
    if not np.isfinite(table.seconds).all() or (table.seconds <= 0).any() or (table.text_chars < 0).any():
        raise ShardError(f"{path}: keys 'seconds' and 'text_chars' must be positive")


def _load_json(path: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not JSON ({error}); write the shards anew") from None


def _get(data: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise ShardError(f"{where}: key {key!r} is missing")
    if not _is_a(data[key], kind):
        raise ShardError(f"{where}: key {key!r}: expected {kind.__name__}, found {data[key]!r:.80}")
    return data[key]


def _counts(data: Any, key: str, where: str) -> dict[str, int]:
    counts: dict[str, int] = _get(data, key, dict, where)
    for name, count in counts.items():
        if not _is_a(count, int) or count < 0:
            raise ShardError(f"{where}: key '{key}.{name[:80]}': expected a count, found {count!r:.80}")
    return counts


def _is_a(value: object, kind: type) -> bool:
    """Tell whether a JSON value is of a kind; an int passes as a float, a bool never as a number."""
    if kind in (int, float):
        numbers = (int, float) if kind is float else (int,)
        # The bound refuses infinities, NaN and integers that no array can hold.
        return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < 2**62
    return isinstance(value, kind)
