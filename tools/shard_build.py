"""The work of `shard_dataset.py`: plan shards, build them in parallel, resume, write the index."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from listen_dist.data.decode import AudioError, decode_audio, join_utterances, probe_seconds
from listen_dist.data.manifest import ManifestError, atomic_file, file_sha256, read_manifest, record_to_dict
from listen_dist.data.shard_writer import WrittenShard, shard_name, write_index, write_shard
from listen_dist.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    FeatureInfo,
    ShardEntry,
    ShardError,
    ShardIndex,
)
from listen_dist.structures import ENCODER_RATE, SAMPLE_RATE, AudioSample, Record, SkippedSample

PROGRESS_FOLDER = ".build"
"""In the output folder: what each finished shard was built from; makes a run resumable."""
_ASSUMED_SECONDS = 10.0
"""For planning only: a clip whose length neither the manifest nor its header tells."""
# On a log file instead of a terminal: a line in half a minute.
_QUIET: dict[str, Any] = {"mininterval": 0.5 if sys.stderr.isatty() else 30.0, "dynamic_ncols": True}
_Input = Callable[[np.ndarray], torch.Tensor]
"""From a waveform [S] to what an encoder reads."""
_MEASURED = 32
"""Samples written to learn how many bytes a second of audio takes."""


@dataclass(frozen=True)
class BuildOptions:
    """What decides the bytes, beside the manifests."""

    shard_seconds: float
    """Audio a shard; 0: as much as fills `shard_bytes`."""
    max_seconds: float
    speech_encoder: str | None
    """Folder or name of the Whisper model whose frames are stored; None: no features."""
    dtype: str
    shard_bytes: int = 0
    """Size of a shard, about."""
    audio_encoder: str | None = None
    """Checkpoint of BEATs whose frames are stored too."""


@dataclass(frozen=True)
class Job:
    """One shard to build."""

    name: str
    folder: Path
    records: tuple[Record, ...]
    plan: str
    """Hash of all that decides the shard's bytes."""
    options: BuildOptions


@dataclass(frozen=True)
class Done:
    """One shard that is built (None: every sample was skipped)."""

    shard: WrittenShard | None
    skipped: tuple[SkippedSample, ...]
    kept: bool


def build(
    sets: dict[Path, list[Path]], options: BuildOptions, workers: int, overwrite: bool
) -> list[ShardIndex]:
    """Build sets of shards (output folder → its manifests) and return their checked indexes.

    All shards of all sets share one pool of workers; each set gets its index when all are done.

    Raises:
        ManifestError: a manifest is wrong, or two of one set hold the same id.
        ShardError: a folder holds shards of other input, or not one sample of a set could be used.
    """
    features = _feature_infos(options)
    jobs = {out: plan_jobs(_read_all(manifests), out, options, features) for out, manifests in sets.items()}
    with contextlib.ExitStack() as locks:
        for out, group in jobs.items():
            (out / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
            locks.enter_context(_only_writer(out))
            _check_output(out, group, overwrite)
        done = _run_jobs([job for group in jobs.values() for job in group], workers)
        return [_finish_set(out, [done[out, job.name] for job in group], features) for out, group in jobs.items()]


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold a set's lock, and remove what a killed writer left half written."""
    try:
        with FileLock(out / PROGRESS_FOLDER / "lock", timeout=0):
            for leftover in (*out.glob(".*.tar.*"), *out.glob(".*.json.*"), *out.glob(f"{PROGRESS_FOLDER}/.*.json.*")):
                leftover.unlink()
            yield
    except Timeout:
        raise ShardError(f"{out}: another process is writing shards here; wait for it, or end it") from None


def _finish_set(out: Path, done: list[Done], features: list[FeatureInfo]) -> ShardIndex:
    shards = [item.shard for item in done if item.shard]
    skipped = [sample for item in done for sample in item.skipped]
    with atomic_file(out / "skipped.jsonl") as file:
        file.writelines(json.dumps(asdict(sample), ensure_ascii=False).encode() + b"\n" for sample in skipped)
    if not shards:
        raise ShardError(
            f"{out}: not one of {len(skipped)} samples could be used; see {out / 'skipped.jsonl'}"
        )
    write_index(out, shards, len(skipped), *(features or [None]))
    index = ShardIndex.load(out)
    _print_summary(index, sum(item.kept for item in done), skipped, out)
    return index


def plan_jobs(
    records: list[Record], out: Path, options: BuildOptions, features: list[FeatureInfo]
) -> list[Job]:
    """Cut the records, in the order of md5(id), into shards of about `shard_seconds` or `shard_bytes`."""
    ordered = sorted(records, key=lambda r: hashlib.md5(r.id.encode(), usedforsecurity=False).digest())
    shard_seconds = options.shard_seconds or options.shard_bytes / _bytes_per_second(ordered, options)
    groups: list[list[Record]] = [[]]
    filled = 0.0
    for record in tqdm(ordered, desc="plan", unit="clip", leave=False, **_QUIET):
        seconds = record.duration or sum(
            probe_seconds(a) or _ASSUMED_SECONDS for a in record.audio if os.path.isfile(a)
        )
        if groups[-1] and filled + seconds > shard_seconds:
            groups.append([])
            filled = 0.0
        groups[-1].append(record)
        filled += seconds
    return [
        Job(shard_name(number), out, tuple(group), _plan_hash(group, options, features), options)
        for number, group in enumerate(groups)
    ]


def _bytes_per_second(ordered: list[Record], options: BuildOptions) -> float:
    """Bytes in a shard for a second of audio, measured by writing the first samples.

    Raises:
        ShardError: not one of them can be used.
    """
    with tempfile.TemporaryDirectory(prefix="listen-measure-") as folder:
        job = Job(shard_name(0), Path(folder), tuple(ordered[:_MEASURED]), "", options)
        written = write_shard(job.folder / job.name, _usable_samples(job, []))
    if written is None:
        raise ShardError(f"none of the first {len(job.records)} samples can be used, so what a second takes is not "
                         "known; give --shard-seconds, and see skipped.jsonl then")
    return written.entry.bytes / written.entry.seconds


def build_shard(job: Job) -> Done:
    """Build one shard and note from what."""
    torch.set_num_threads(1)  # a worker a core: more threads would only spin against each other
    skipped: list[SkippedSample] = []
    written = write_shard(job.folder / job.name, _usable_samples(job, skipped))
    progress = {
        "plan": job.plan,
        "entry": asdict(written.entry) if written else None,
        "languages": written.languages if written else {},
        "skipped": [asdict(sample) for sample in skipped],
    }
    with atomic_file(_progress_file(job)) as file:
        file.write(json.dumps(progress).encode())
    return Done(written, tuple(skipped), kept=False)


def _read_all(manifests: Iterable[Path]) -> list[Record]:
    records: list[Record] = []
    owner: dict[str, Path] = {}
    for manifest in manifests:
        for record in read_manifest(manifest):
            if record.id in owner:
                raise ManifestError(
                    f"{manifest}: id {record.id!r} stands in {owner[record.id]} too; ids are unique"
                )
            owner[record.id] = manifest
            records.append(record)
    if not records:
        raise ManifestError(f"{', '.join(map(str, manifests))}: no records")
    return records


def _plan_hash(records: list[Record], options: BuildOptions, features: list[FeatureInfo]) -> str:
    """Hash what decides a shard's bytes; audio files stand for themselves by size and time of change."""
    files = [_file_state(path) for record in records for path in record.audio]
    rows = [record_to_dict(record) for record in records]
    encoders = [asdict(info) for info in features]
    # One encoder stands alone, as when there was no second: shards of then need not be built again.
    encoder = encoders[0] if len(encoders) == 1 else encoders or None
    plan = [FORMAT_VERSION, rows, files, options.max_seconds, encoder, options.dtype if features else None]
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def _check_output(out: Path, jobs: list[Job], overwrite: bool) -> None:
    """Refuse to mix with a finished set of other input; make room when the plan changed or was never finished."""
    plans = {job.name: job.plan for job in jobs}
    strangers = [
        path
        for path in sorted(out.glob("shard-*.tar"))
        if _saved_plan(out, path.name) != plans.get(path.name)
    ]
    if (out / INDEX_NAME).is_file() and strangers:
        if not overwrite:
            raise ShardError(
                f"{out}: holds shards of other manifests or options ({strangers[0].name});"
                " give another folder, or --overwrite to replace them"
            )
        (out / INDEX_NAME).unlink()  # first: an index must never name shards that are being replaced
    for path in strangers:
        if path.name not in plans:
            path.unlink()
            path.with_name(path.name.removesuffix(".tar") + ".samples.json").unlink(missing_ok=True)


def _saved_plan(out: Path, name: str) -> str | None:
    progress = _read_json(out / PROGRESS_FOLDER / f"{name}.json")
    return progress.get("plan") if progress else None


def _run_jobs(jobs: list[Job], workers: int) -> dict[tuple[Path, str], Done]:
    done: dict[tuple[Path, str], Done] = {}
    # What an earlier run finished comes first and is not counted as speed: the time left would be far too short.
    for job in tqdm(jobs, desc="check finished shards", unit="shard", leave=False, **_QUIET):
        if kept := _finished(job):
            done[job.folder, job.name] = kept
    left = [job for job in jobs if (job.folder, job.name) not in done]
    clips, missing = (sum(len(job.records) for job in some) for some in (jobs, left))
    with tqdm(total=clips, initial=clips - missing, desc="shards", unit="clip", smoothing=0.05, **_QUIET) as bar:
        for job, result in _results(left, workers):
            done[job.folder, job.name] = result
            bar.update(len(job.records))
    return done


def _results(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Done]]:
    """Build shards and yield them as they finish."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, build_shard(job)
        return
    # spawn: forking a process in which torch has started threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(build_shard, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _finished(job: Job) -> Done | None:
    progress = _read_json(_progress_file(job))
    if not progress or progress.get("plan") != job.plan:
        return None
    skipped = tuple(SkippedSample(**sample) for sample in progress["skipped"])
    if progress["entry"] is None:
        return Done(None, skipped, kept=True)
    entry = ShardEntry(**progress["entry"])
    try:
        intact = (
            file_sha256(job.folder / entry.name) == entry.sha256
            and file_sha256(job.folder / entry.sidecar) == entry.samples_sha256
        )
    except OSError:
        return None
    return Done(WrittenShard(entry, progress["languages"]), skipped, kept=True) if intact else None


def _progress_file(job: Job) -> Path:
    return job.folder / PROGRESS_FOLDER / f"{job.name}.json"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _usable_samples(job: Job, skipped: list[SkippedSample]) -> Iterator[AudioSample]:
    for record in job.records:
        try:
            waveform = _decode(record, job.options.max_seconds)
        except (AudioError, OSError) as error:
            skipped.append(SkippedSample(record.id, job.name, str(error), record.task))
            continue
        yield AudioSample(record, waveform, *_features(waveform, job.options))


def _decode(record: Record, max_seconds: float) -> np.ndarray:
    """Return float32 [S]; two files are joined, and their sum must keep the limit."""
    waveforms = [decode_audio(path, max_seconds) for path in record.audio]
    waveform = waveforms[0] if len(waveforms) == 1 else join_utterances(waveforms[0], waveforms[1])
    if len(waveform) > max_seconds * SAMPLE_RATE:
        raise AudioError(f"two utterances joined are longer than {max_seconds:g} s")
    return waveform


def _features(waveform: np.ndarray, options: BuildOptions) -> list[np.ndarray]:
    """Return the encoders' float16 [F, E] on the clip's true length, that of speech first; maybe none."""
    return [encoder.encode([prepare(waveform)])[0].float().cpu().numpy().astype(np.float16)
            for encoder, prepare in _encoders(options.speech_encoder, options.audio_encoder, options.dtype)]


def _feature_infos(options: BuildOptions) -> list[FeatureInfo]:
    return [FeatureInfo(encoder.fingerprint, encoder.width, ENCODER_RATE)
            for encoder, _ in _encoders(options.speech_encoder, options.audio_encoder, options.dtype)]


@lru_cache(maxsize=1)
def _encoders(speech: str | None, audio: str | None, dtype: str) -> list[tuple[Any, _Input]]:
    """Load the encoders once a process, each with what makes its input; imported late: transformers takes seconds."""
    if speech is None:
        return []
    from listen_dist.data.features import Fbank, LogMel
    from listen_dist.models.beats import load_audio_encoder
    from listen_dist.models.encoders import load_speech_encoder

    of_type = getattr(torch, dtype)
    found: list[tuple[Any, _Input]] = [(load_speech_encoder(speech, of_type), LogMel.from_pretrained(speech))]
    return [*found, (load_audio_encoder(audio, of_type), Fbank())] if audio else found


def _print_summary(index: ShardIndex, kept: int, skipped: list[SkippedSample], out: Path) -> None:
    tasks = ", ".join(f"{task} {count}" for task, count in index.tasks.items())
    print(
        f"{out}: {index.samples} samples, {index.seconds / 3600:.2f} h in {len(index.shards)} shards"
        f" ({kept} kept from an earlier run); {tasks}"
    )
    if skipped:
        print(f"skipped {len(skipped)} samples, for instance {skipped[0].id}: {skipped[0].reason}")
        print(f"all of them with reasons: {out / 'skipped.jsonl'}")
