"""Shards as they are written: the same samples always give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset

from listen_dist.data.decode import to_pcm16
from listen_dist.data.manifest import atomic_file, file_sha256, record_to_dict
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import FORMAT_VERSION, INDEX_NAME, FeatureInfo, ShardEntry
from listen_dist.structures import SAMPLE_RATE, AudioSample
from listen_dist.tasks import instruction_for


@dataclass(frozen=True)
class WrittenShard:
    """What writing one shard yields for the index."""

    entry: ShardEntry
    languages: dict[str, int]


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[AudioSample]) -> WrittenShard | None:
    """Write samples (each with a waveform, perhaps with features) as a tar and its sidecar.

    Each file is written under a temporary name, synced and renamed, the sidecar last.
    Returns None, and leaves no file, if `samples` is empty.

    Raises:
        ShardError: stored frames that aren't finite.
    """
    columns: dict[str, list[Any]] = {
        key: [] for key in ("id", "offset", "bytes", "seconds", "task", "text_chars")
    }
    languages: Counter[str] = Counter()
    with atomic_file(path) as file:
        # encoder=False: bytes as given. mtime, user and group fixed: the bytes depend on the samples alone.
        writer = webdataset.TarWriter(
            file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
        )
        with writer:
            for sample in samples:
                start = writer.tarstream.offset
                writer.write(_members(sample))
                _add_row(columns, sample, start, writer.tarstream.offset)
                languages[sample.record.language] += 1
    if not columns["id"]:
        path.unlink()
        return None
    sidecar = json.dumps(columns, ensure_ascii=False, separators=(",", ":")).encode()
    entry = ShardEntry(
        name=path.name,
        samples=len(columns["id"]),
        bytes=path.stat().st_size,
        seconds=round(sum(columns["seconds"]), 4),
        sha256=file_sha256(path),
        samples_sha256=hashlib.sha256(sidecar).hexdigest(),
        tasks=dict(sorted(Counter(columns["task"]).items())),
    )
    with atomic_file(path.parent / entry.sidecar) as file:
        file.write(sidecar)
    return WrittenShard(entry, dict(sorted(languages.items())))


def write_index(
    folder: Path, shards: Sequence[WrittenShard], skipped: int, features: FeatureInfo | None,
    audio_features: FeatureInfo | None = None,
) -> None:
    """Write `index.json` over finished shards; call it last, since its presence says that all is there."""
    stored = {kind: asdict(info) for kind, info in (("speech", features), ("audio", audio_features)) if info}
    tasks: Counter[str] = sum((Counter(shard.entry.tasks) for shard in shards), Counter())
    languages: Counter[str] = sum((Counter(shard.languages) for shard in shards), Counter())
    index = {
        "format_version": FORMAT_VERSION,
        "shards": [asdict(shard.entry) for shard in shards],
        "samples": sum(shard.entry.samples for shard in shards),
        "seconds": round(sum(shard.entry.seconds for shard in shards), 4),
        "tasks": dict(sorted(tasks.items())),
        "languages": dict(sorted(languages.items())),
        "skipped": skipped,
        "features": stored or None,
    }
    with atomic_file(folder / INDEX_NAME) as file:
        file.write(json.dumps(index, ensure_ascii=False, indent=1).encode() + b"\n")


def encode_flac(waveform: np.ndarray) -> bytes:
    """Return float32 [S] at 16 kHz as 16-bit FLAC; values outside -1 to 1 are clipped."""
    file = io.BytesIO()
    soundfile.write(file, to_pcm16(waveform), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def encode_features(frames: np.ndarray) -> bytes:
    """Return encoder frames [F, E] as the bytes of a float16 .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(frames, dtype=np.float16), allow_pickle=False)
    return file.getvalue()


def _members(sample: AudioSample) -> dict[str, Any]:
    if sample.waveform is None:
        raise ValueError(f"sample {sample.record.id!r} has no waveform to write")
    fields = record_to_dict(replace(sample.record, audio=()))  # the paths mean nothing to a reader elsewhere
    members = {
        "__key__": sample.record.id,
        "flac": encode_flac(sample.waveform),
        "json": json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    for kind, frames in (("speech", sample.features), ("audio", sample.audio_features)):
        if frames is not None:
            if not np.isfinite(frames).all():
                raise ShardError(f"sample {sample.record.id!r}: its {kind} frames aren't finite, so they aren't stored")
            members[f"{kind}.npy"] = encode_features(frames)
    return members


def _add_row(columns: dict[str, list[Any]], sample: AudioSample, start: int, end: int) -> None:
    assert sample.waveform is not None
    record = sample.record
    columns["id"].append(record.id)
    columns["offset"].append(start)
    columns["bytes"].append(end - start)
    columns["seconds"].append(len(sample.waveform) / SAMPLE_RATE)
    columns["task"].append(record.task)
    columns["text_chars"].append(len(record.answers[0]) + len(instruction_for(record)))
