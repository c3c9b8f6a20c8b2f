"""The work of `shard_dataset.py`: plan shards, build them in parallel, resume, write the index."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from shard_inputs import InputFile, SetPlan, rows_hash
from tqdm import tqdm

from listen_dist.data.decode import AudioError, UnreachableAudio, join_utterances, probe_seconds, read_audio
from listen_dist.data.manifest import ManifestError, atomic_file, file_sha256, read_manifest
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
    """Hash of all that decides the shard's bytes, beside what the audio files hold."""
    options: BuildOptions

    @property
    def paths(self) -> list[str]:
        """Of its audio files, in order."""
        return [path for record in self.records for path in record.audio]


@dataclass(frozen=True)
class Remark:
    """What one should know of a sample though it is used (`listen_dist.data.decode.Sound`)."""

    id: str
    shard: str
    remark: str


@dataclass
class Notes:
    """What building a shard brings to light."""

    skipped: list[SkippedSample] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    """Audio files that the system didn't hand out."""


@dataclass(frozen=True)
class Done:
    """One shard that is built (None: every sample was skipped)."""

    shard: WrittenShard | None
    notes: Notes
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
    records = {out: _read_all(manifests) for out, manifests in sets.items()}
    with contextlib.ExitStack() as locks:
        jobs: dict[Path, list[Job]] = {}
        for out, rows in records.items():
            (out / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
            locks.enter_context(_only_writer(out))
            plan, jobs[out] = plan_jobs(rows, out, options, features)
            _check_output(out, plan, jobs[out], overwrite)
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
    skipped = [sample for item in done for sample in item.notes.skipped]
    remarks = [remark for item in done for remark in item.notes.remarks]
    rows: list[SkippedSample] | list[Remark]
    for name, rows in (("skipped.jsonl", skipped), ("remarks.jsonl", remarks)):
        with atomic_file(out / name) as file:
            file.writelines(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n" for row in rows)
    unreachable = sorted({path for item in done for path in item.notes.unreachable})
    if unreachable:
        print(f"warning: {out}: {len(unreachable)} files were out of reach, for instance {unreachable[0]}; the same "
              "command tries them again", file=sys.stderr)
    if not shards:
        raise ShardError(f"{out}: not one of {len(skipped)} samples could be used, the first because: "
                         f"{skipped[0].reason}; see {out / 'skipped.jsonl'}")
    write_index(out, shards, len(skipped), *(features or [None]))
    index = ShardIndex.load(out)
    _print_summary(index, sum(item.kept for item in done), skipped, remarks, out)
    return index


def plan_jobs(records: list[Record], out: Path, options: BuildOptions, features: list[FeatureInfo],
              ) -> tuple[SetPlan, list[Job]]:
    """Cut the records, in the order of md5(id), into shards of about `shard_seconds` or `shard_bytes`.

    A set that was cut before is cut in the same places: a file that was out of reach then must not move all others.
    """
    ordered = sorted(records, key=lambda r: hashlib.md5(r.id.encode(), usedforsecurity=False).digest())
    encoders = [asdict(info) for info in features]
    named = {"format": FORMAT_VERSION, "max_seconds": options.max_seconds, "shard_seconds": options.shard_seconds,
             "shard_bytes": options.shard_bytes, "encoders": encoders}
    plan = SetPlan(rows_hash(ordered), len(ordered), named, [])
    saved = SetPlan.load(out / PROGRESS_FOLDER)
    same = saved is not None and replace(saved, counts=[]) == plan and sum(saved.counts) == len(ordered)
    plan = saved if saved and same else replace(plan, counts=_cut(ordered, options))
    ends = itertools.accumulate(plan.counts)
    groups = [ordered[end - count : end] for count, end in zip(plan.counts, ends, strict=True)]
    return plan, [Job(shard_name(number), out, tuple(group),
                      rows_hash(group, FORMAT_VERSION, options.max_seconds, encoders), options)
                  for number, group in enumerate(groups)]


def _cut(ordered: list[Record], options: BuildOptions) -> list[int]:
    """Records of each shard."""
    shard_seconds = options.shard_seconds or options.shard_bytes / _bytes_per_second(ordered, options)
    counts = [0]
    filled = 0.0
    for record in tqdm(ordered, desc="plan", unit="clip", leave=False, **_QUIET):
        seconds = record.duration or sum(probe_seconds(path) or _ASSUMED_SECONDS for path in record.audio)
        if counts[-1] and filled + seconds > shard_seconds:
            counts.append(0)
            filled = 0.0
        counts[-1] += 1
        filled += seconds
    return counts


def _bytes_per_second(ordered: list[Record], options: BuildOptions) -> float:
    """Bytes in a shard for a second of audio, measured by writing the first samples.

    Raises:
        ShardError: not one of them can be used.
    """
    with tempfile.TemporaryDirectory(prefix="listen-measure-") as folder:
        job = Job(shard_name(0), Path(folder), tuple(ordered[:_MEASURED]), "", options)
        written = write_shard(job.folder / job.name, _usable_samples(job, Notes()))
    if written is None:
        raise ShardError(f"none of the first {len(job.records)} samples can be used, so what a second takes is not "
                         "known; give --shard-seconds, and see skipped.jsonl then")
    return written.entry.bytes / written.entry.seconds


def build_shard(job: Job) -> Done:
    """Build one shard and note from what."""
    torch.set_num_threads(1)  # a worker a core: more threads would only spin against each other
    notes = Notes()
    written = write_shard(job.folder / job.name, _usable_samples(job, notes))
    files = [InputFile(path) if path in notes.unreachable else InputFile.of(path) for path in job.paths]
    progress = {
        "plan": job.plan,
        "inputs": [asdict(file) for file in files],
        "entry": asdict(written.entry) if written else None,
        "languages": written.languages if written else {},
        "skipped": [asdict(sample) for sample in notes.skipped],
        "remarks": [asdict(remark) for remark in notes.remarks],
    }
    with atomic_file(_progress_file(job)) as file:
        file.write(json.dumps(progress).encode())
    return Done(written, notes, kept=False)


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


def _check_output(out: Path, plan: SetPlan, jobs: list[Job], overwrite: bool) -> None:
    """Refuse to mix with a finished set of other input; make room when the plan changed or was never finished."""
    progress = out / PROGRESS_FOLDER
    plans = {job.name: job.plan for job in jobs}
    written = sorted(out.glob("shard-*.tar"))
    strangers = [path for path in written if _saved_plan(out, path.name) != plans.get(path.name)]
    again, changed = _changed_inputs(jobs)
    if (out / INDEX_NAME).is_file() and (strangers or changed) and not overwrite:
        what = plan.difference(SetPlan.load(progress)) if strangers else (
            f"{changed[0]}{f' and {len(changed) - 1} more files' if changed[1:] else ''} held something else then")
        raise ShardError(f"{out}: holds shards of other input: {what}; give another folder, or --overwrite to write "
                         "anew what changed")
    if strangers or again:
        (out / INDEX_NAME).unlink(missing_ok=True)  # first: an index must never name shards that are being replaced
    for job in again:
        _progress_file(job).unlink()
    for path in strangers:
        if path.name not in plans:
            path.unlink()
            path.with_name(path.name.removesuffix(".tar") + ".samples.json").unlink(missing_ok=True)
    plan.save(progress)


def _changed_inputs(jobs: list[Job]) -> tuple[list[Job], list[str]]:
    """The jobs to do again, since a file holds something else or is within reach now, and the files that changed."""
    again, changed = [], []
    for job in jobs:
        progress = _read_json(_progress_file(job)) or {}
        if progress.get("plan") != job.plan:
            continue
        files = [InputFile(**file) for file in progress["inputs"]]
        moved = [(file, path) for file, path in zip(files, job.paths, strict=True) if file.has_changed(path)]
        again += [job] if moved else []
        changed += [path for file, path in moved if file.sha256]
    return again, changed


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
    notes = Notes([SkippedSample(**sample) for sample in progress["skipped"]],
                  [Remark(**remark) for remark in progress["remarks"]],
                  {file["path"] for file in progress["inputs"] if not file["sha256"]})
    if progress["entry"] is None:
        return Done(None, notes, kept=True)
    entry = ShardEntry(**progress["entry"])
    try:
        intact = (
            file_sha256(job.folder / entry.name) == entry.sha256
            and file_sha256(job.folder / entry.sidecar) == entry.samples_sha256
        )
    except OSError:
        return None
    return Done(WrittenShard(entry, progress["languages"]), notes, kept=True) if intact else None


def _progress_file(job: Job) -> Path:
    return job.folder / PROGRESS_FOLDER / f"{job.name}.json"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _usable_samples(job: Job, notes: Notes) -> Iterator[AudioSample]:
    for record in job.records:
        try:
            waveform, remarks = _decode(record, job.options.max_seconds)
            sample = AudioSample(record, waveform, *_features(waveform, job.options))
        except (AudioError, ShardError) as error:
            notes.skipped.append(SkippedSample(record.id, job.name, str(error), record.task))
            notes.unreachable.update(record.audio if isinstance(error, UnreachableAudio) else ())
            continue
        notes.remarks += [Remark(record.id, job.name, remark) for remark in remarks]
        yield sample


def _decode(record: Record, max_seconds: float) -> tuple[np.ndarray, list[str]]:
    """Return float32 [S] and what there is to say of it; two files are joined, and their sum must keep the limit."""
    sounds = [read_audio(path, max_seconds) for path in record.audio]
    waveform = join_utterances(*(sound.samples for sound in sounds)) if sounds[1:] else sounds[0].samples
    if len(waveform) > max_seconds * SAMPLE_RATE:
        raise AudioError(f"two utterances joined are longer than {max_seconds:g} s")
    return waveform, [remark for sound in sounds for remark in sound.remarks]


def _features(waveform: np.ndarray, options: BuildOptions) -> list[np.ndarray]:
    """Return the encoders' float16 [F, E] on the clip's true length, that of speech first; maybe none.

    Raises:
        ShardError: a value isn't finite, or float16 can't hold it.
    """
    found = []
    for encoder, prepare in _encoders(options.speech_encoder, options.audio_encoder):
        frames = encoder.encode([prepare(waveform)])[0].float().cpu().numpy().astype(np.float16)
        if not np.isfinite(frames).all():
            raise ShardError(f"frames of {type(encoder).__name__} aren't finite (NaN, or too large for float16)")
        found.append(frames)
    return found


def _feature_infos(options: BuildOptions) -> list[FeatureInfo]:
    return [FeatureInfo(encoder.fingerprint, encoder.width, ENCODER_RATE)
            for encoder, _ in _encoders(options.speech_encoder, options.audio_encoder)]


@lru_cache(maxsize=1)
def _encoders(speech: str | None, audio: str | None) -> list[tuple[Any, _Input]]:
    """Load the encoders once a process, each with what makes its input; imported late: transformers takes seconds."""
    if speech is None:
        return []
    from listen_dist.data.features import Fbank, LogMel
    from listen_dist.models.beats import load_audio_encoder
    from listen_dist.models.encoders import load_speech_encoder

    found: list[tuple[Any, _Input]] = [(load_speech_encoder(speech, torch.float32), LogMel.from_pretrained(speech))]
    return [*found, (load_audio_encoder(audio, torch.float32), Fbank())] if audio else found


def _print_summary(index: ShardIndex, kept: int, skipped: list[SkippedSample], remarks: list[Remark],
                   out: Path) -> None:
    tasks = ", ".join(f"{task} {count}" for task, count in index.tasks.items())
    print(
        f"{out}: {index.samples} samples, {index.seconds / 3600:.2f} h in {len(index.shards)} shards"
        f" ({kept} kept from an earlier run); {tasks}"
    )
    if skipped:
        print(f"skipped {len(skipped)} samples, for instance {skipped[0].id}: {skipped[0].reason}")
        print(f"all of them with reasons: {out / 'skipped.jsonl'}")
    for kind, count in Counter(remark.remark.partition(":")[0] for remark in remarks).items():
        example = next(remark.id for remark in remarks if remark.remark.startswith(kind))
        print(f"used all the same, {kind}: {count} times, for instance {example}")
    if remarks:
        print(f"all of them: {out / 'remarks.jsonl'}")
