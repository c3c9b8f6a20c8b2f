"""Shards as they are read: `index.json`, the sidecars, and one sample by one read.

A folder of shards (written by `shard_writer.py`) holds

    index.json                  what there is: a list of shards with counts, bytes, seconds, hashes
    shard-000000.tar            plain WebDataset: <id>.flac, <id>.json, perhaps <id>.speech.npy
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
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from listen_dist.data.decode import AudioError
from listen_dist.data.manifest import ManifestError, check_id
from listen_dist.data.shard_entries import ShardEntries, ShardEntry
from listen_dist.data.shard_members import ShardError, Want, parse_sample
from listen_dist.structures import AudioSample

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MOST_CHECKED = 10_000
"""Shards whose size is compared with the index at start; all of them in a set of up to so many."""
CHECK_THREADS = 16

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

    folder: Path
    shards: ShardEntries
    samples: int
    seconds: float
    tasks: dict[str, int]
    languages: dict[str, int]
    skipped: int
    features: FeatureInfo | None

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ShardIndex:
        """Read and check `index.json` (or the folder that holds it), and that the shards are there in full size.

        Of more than MOST_CHECKED shards, every second (third …) is looked at; one that is cut short shows when read.

        Raises:
            ShardError: a file is missing, cut short, or disagrees with the index; names it and the cure.
        """
        file = Path(path) / INDEX_NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ShardError(f"{file}: no such index; write shards with tools/shard_dataset.py")
        return _index_from_json(file, _load_json(file, file.read_bytes()))

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
        entry = self.shards[shard]
        return _read_table(self.folder / entry.sidecar, entry.samples_sha256, entry.samples, entry.bytes)

    def read_sample(
        self, shard: int, row: int, want: Want = "audio", max_seconds: float = 60.0
    ) -> AudioSample:
        """Read one sample: its record, and the waveform and/or the stored features.

        Raises:
            ShardError: anything about the sample or its shard is wrong.
        """
        entry, table = self.shards[shard], self.shard_table(shard)
        path = self.folder / entry.name
        try:
            block = _read_range(path, int(table.offset[row]), int(table.bytes[row]))
            width = self.features.width if self.features else None
            return parse_sample(block, table.ids[row], want, max_seconds, width)
        except (ShardError, ManifestError, AudioError) as error:
            raise ShardError(f"{path}: sample {table.ids[row]!r}: {error}") from None

    def verify(self) -> None:
        """Compare the hash of every shard and sidecar with the index.

        Raises:
            ShardError: the first file that differs.
        """
        for number, entry in enumerate(self.shards):
            self.shard_table(number)
            if file_sha256(self.folder / entry.name) != entry.sha256:
                raise ShardError(f"{self.folder / entry.name}: sha256 differs from the index; write it anew")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _index_from_json(file: Path, data: Any) -> ShardIndex:
    where = str(file)
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
        folder=file.parent,
        shards=ShardEntries(entries),
        samples=_get(data, "samples", int, where),
        seconds=_get(data, "seconds", float, where),
        tasks=_counts(data, "tasks", where),
        languages=_counts(data, "languages", where),
        skipped=_get(data, "skipped", int, where),
        features=_features_from_json(data.get("features"), where),
    )
    totals: Counter[str] = Counter()
    for entry in entries:
        totals.update(entry.tasks)
    if index.samples != sum(entry.samples for entry in entries) or index.tasks != dict(totals):
        raise ShardError(f"{file}: keys 'samples' and 'tasks' are not the sums over 'shards'; write it anew")
    with ThreadPool(CHECK_THREADS) as pool:  # on a shared folder each look takes a round trip
        pool.map(partial(_check_files, file.parent), entries[:: -(-len(entries) // MOST_CHECKED)])
    return index


def _check_files(folder: Path, entry: ShardEntry) -> None:
    _check_size(folder / entry.name, entry.bytes)
    if not (folder / entry.sidecar).is_file():
        raise ShardError(f"{folder / entry.sidecar}: missing; write the shard anew or restore it")


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
    for key, value in (("sha256", entry.sha256), ("samples_sha256", entry.samples_sha256)):
        if not _SHA256.fullmatch(value):
            raise ShardError(f"{where}: key {key!r}: {value[:100]!r} is no SHA-256 in 64 hexadecimal digits")
    if entry.samples < 1 or entry.samples != sum(entry.tasks.values()):
        raise ShardError(f"{where}: key 'samples': {entry.samples} is not the sum over 'tasks'")
    return entry


def _features_from_json(data: Any, where: str) -> FeatureInfo | None:
    if data is None:
        return None
    speech = _get(data, "speech", dict, f"{where}: features")
    where = f"{where}: features.speech"
    return FeatureInfo(
        _get(speech, "fingerprint", str, where),
        _get(speech, "width", int, where),
        _get(speech, "rate", int, where),
    )


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise ShardError(
            f"{path}: missing; write it anew with tools/shard_dataset.py or restore it"
        ) from None
    if size != expected:
        state = "cut short" if size < expected else "too long"
        raise ShardError(f"{path}: {state}: {size} bytes, the index says {expected}; copy or write it anew")


# A table of a 600 s shard takes about 60 kB, so this many stay well under 32 MB.
@lru_cache(maxsize=512)
def _read_table(path: Path, sha256: str, samples: int, tar_bytes: int) -> SampleTable:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"{path}: can't be read ({error.strerror}); write the shard anew or restore it"
        ) from None
    if hashlib.sha256(text).hexdigest() != sha256:
        raise ShardError(f"{path}: sha256 differs from the index; write the shard anew")
    data = _load_json(path, text)
    columns: dict[str, list[Any]] = {}
    for key, kind in _COLUMNS.items():
        columns[key] = _get(data, key, list, str(path))
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


def _check_table(path: Path, table: SampleTable, tar_bytes: int) -> None:
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


def _read_range(path: Path, offset: int, size: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"the shard can't be opened ({error.strerror}); restore it") from None
    try:
        block = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(block) != size:
        raise ShardError(f"the shard is cut short at byte {offset + len(block)}; copy or write it anew")
    return block


def _load_json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
