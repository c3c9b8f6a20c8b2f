"""The loader: from a plan of samples to batches on this rank.

Stages, in the order a sample passes them:

1. plan      schedule.py deals out sample references; every rank makes the same plan
2. read      one read of the tar's byte range, the record parsed (shards.py)
3. text      instruction and target to token ids (text.py)
4. decode    FLAC to a waveform (decode.py), or the stored encoder frames as they are
5. augment   in training, if asked for: the waveform, and after stage 6 the log-mel (augment.py)
6. features  log-mel, and a filterbank for an audio encoder, on the true length (features.py)
7. collate   padding and true lengths (collate.py)

Stages 2 to 7 are `BatchReader`, which runs in torch DataLoader workers. A sample that
fails in them is named in the batch and left out; the run goes on.
"""

from __future__ import annotations

import atexit
import itertools
import math
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from listen_dist.data.augment import Augmenter
from listen_dist.data.collate import Prepared, collate
from listen_dist.data.features import Fbank, LogMel
from listen_dist.data.mixture import Mixture, SampleRef
from listen_dist.data.remote import take_retries
from listen_dist.data.schedule import TokenCost, plan_batches, plan_once
from listen_dist.data.shard_members import PackedSample, ShardError, Want
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.errors import ListenError, LoaderError
from listen_dist.schema import DataConfig
from listen_dist.structures import SAMPLE_RATE, AudioSample, Batch, LoaderState, Record, SkippedSample
from listen_dist.tasks import choices_for, target_for

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class _Fetched:
    """A sample between reading and decoding."""

    ref: SampleRef
    packed: PackedSample
    after_ids: list[int]
    target_ids: list[int]
    choices: tuple[str, ...]


class BatchReader(Dataset[Batch]):
    """Stages 2 to 7 for one micro-batch; indexed by a list of sample references.

    Args:
        indexes: the sets, in the order that references count them.
        with_targets: False for decoding, where the model must not see the answer.
        augmenter: changes the audio, in training.
        fbank: given where there is an audio encoder beside the speech encoder.
    """

    def __init__(self, indexes: Sequence[ShardIndex], log_mel: LogMel, text: TextEncoder, config: DataConfig,
                 with_targets: bool, augmenter: Augmenter | None = None, fbank: Fbank | None = None) -> None:
        self.indexes = list(indexes)
        self._log_mel = log_mel
        self._fbank = fbank
        self._text = text
        self._config = config
        self._with_targets = with_targets
        self._augmenter = augmenter
        # One kind of input for all sets: a batch may mix them.
        self.is_features = config.stored_features and all(
            index.features and (fbank is None or index.audio_features) for index in indexes)

    def __getitem__(self, refs: list[SampleRef]) -> Batch:  # type: ignore[override]
        skipped: list[SkippedSample] = []
        # Stage by stage, not sample by sample: a stage's code and tables then stay in the processor's caches.
        fetched = self._each(refs, self._fetch, skipped)
        batch = collate(self._each(fetched, self._prepare, skipped), self.is_features, skipped)
        # A loader process tells with its batches; the trainer asks its own count itself (see `Meter.report`).
        return replace(batch, retries=take_retries()) if get_worker_info() else batch

    def _each(self, items: Sequence[T], stage: Callable[[T], U], skipped: list[SkippedSample]) -> list[U]:
        """Take samples through a stage; those that can't be used are named and left out."""
        done = []
        for item in items:
            try:
                done.append(stage(item))
            except ShardError as error:
                ref = item.ref if isinstance(item, _Fetched) else item
                assert isinstance(ref, SampleRef)
                index = self.indexes[ref.set]
                table = index.shard_table(ref.shard)
                skipped.append(SkippedSample(table.ids[ref.row], str(index.folder / index.shards[ref.shard].name),
                                             str(error), str(table.tasks[ref.row])))
        return done

    def _fetch(self, ref: SampleRef) -> _Fetched:
        """Stages 2 and 3."""
        packed = self.indexes[ref.set].fetch_sample(ref.shard, ref.row)
        record, config = packed.record, self._config
        target = self._text.target_ids(target_for(record)) if self._with_targets else []
        if len(target) > config.max_target_tokens:
            raise ShardError(f"target of {len(target)} tokens is above data.max_target_tokens = "
                             f"{config.max_target_tokens}")
        choices = () if self._with_targets else self._choices(record)
        return _Fetched(ref, packed, self._text.after_ids(record), target, choices)

    def _prepare(self, fetched: _Fetched) -> Prepared:
        """Stages 4 to 6."""
        ref, config = fetched.ref, self._config
        index = self.indexes[ref.set]
        want: Want = "features" if self.is_features else "audio"
        sample = index.decode_sample(ref.shard, ref.row, fetched.packed, want, config.max_seconds)
        fbank = None
        if sample.features is not None:
            seconds = float(index.shard_table(ref.shard).seconds[ref.row])
            if seconds > config.max_seconds:  # decoding refuses a long clip, stored features know no length
                raise ShardError(f"clip of {seconds:.1f} s is above data.max_seconds = {config.max_seconds}")
            audio = torch.from_numpy(self._stored(sample))
        else:
            assert sample.waveform is not None
            audio, fbank, seconds = self._features(sample.waveform, sample.record.id, ref.epoch)
        return Prepared(sample.record, audio, fetched.after_ids, fetched.target_ids, seconds, fetched.choices,
                        tuple(self._text.target_ids(choice) for choice in fetched.choices), fbank)

    def _stored(self, sample: AudioSample) -> np.ndarray:
        """Stored frames float16 [F, E]; with an audio encoder its own beside them, as `models.encoders.join_frames`."""
        assert sample.features is not None
        if self._fbank is None:
            return sample.features.copy()
        assert sample.audio_features is not None
        frames, sounds = len(sample.features), sample.audio_features[: len(sample.features)]
        return np.concatenate([sample.features, np.pad(sounds, ((0, frames - len(sounds)), (0, 0)))], axis=1)

    def _choices(self, record: Record) -> tuple[str, ...]:
        try:
            return choices_for(record)
        except ListenError as error:
            raise ShardError(str(error)) from None

    def _features(self, wave: np.ndarray, name: str, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """Log-mel [mels, M] of a waveform [S], its filterbank [M', 128] and its seconds, all after augmentation."""
        if self._augmenter is None:
            log_mel = self._log_mel(wave)
        else:
            random = self._augmenter.generator(name, epoch)
            wave = self._augmenter.waveform(wave, random)
            log_mel = self._augmenter.log_mel(self._log_mel(wave), random)
        return log_mel, self._fbank(wave) if self._fbank else None, len(wave) / SAMPLE_RATE


class _StepSampler:
    """Deals the plan out to one rank and remembers the state behind each step."""

    def __init__(self, plan: Iterator[tuple[list[SampleRef], LoaderState]], per_step: int, rank: int,
                 world_size: int) -> None:
        self._plan = plan
        self._per_step = per_step
        self._rank = rank
        self._world_size = world_size
        self.rounds = math.ceil(per_step / world_size)
        self.states: deque[LoaderState] = deque()

    def __iter__(self) -> Iterator[list[SampleRef]]:
        while True:
            step = [next(self._plan) for _ in range(self._per_step)]
            mine = [refs for refs, _ in step[self._rank :: self._world_size]]
            # Ranks beyond the last batch of a round get an empty one, so that all have equally many.
            mine += [[]] * (self.rounds - len(mine))
            self.states.append(step[-1][1])
            yield from mine


def training_steps(reader: BatchReader, mixture: Mixture, cost: TokenCost, config: DataConfig, seed: int,
                   per_step: int, rank: int, world_size: int, start: LoaderState, pin_memory: bool = False,
                   ) -> Generator[tuple[list[Batch], LoaderState], None, None]:
    """Endless optimizer steps: this rank's micro-batches of each, and the state behind it.

    Closing the iterator ends the worker processes.

    Args:
        mixture: of the reader's sets.
        per_step: micro-batches of a step over all ranks together.
        start: where to go on; the default state begins anew.
        pin_memory: hand out page-locked tensors, which a GPU takes faster.

    Raises:
        LoaderError: a worker process died.
    """
    plan = plan_batches(mixture, cost, config.batch_tokens, config.window, seed, start)
    sampler = _StepSampler(plan, per_step, rank, world_size)
    batches = _batches(reader, sampler, config.workers, pin_memory)
    while True:
        yield [next(batches) for _ in range(sampler.rounds)], sampler.states.popleft()


def decoding_batches(reader: BatchReader, cost: TokenCost, budget: int, workers: int, rank: int, world_size: int,
                     limit: int = 0, done: Set[str] = frozenset()) -> tuple[Iterator[Batch], int]:
    """This rank's share of one pass over the reader's only set; over all ranks every sample comes once.

    Args:
        done: ids to leave out.

    Returns:
        the batches, and the most that any rank has.
    """
    (index,) = reader.indexes
    batches = plan_once(index, cost, budget, limit, done)
    return _batches(reader, batches[rank::world_size], workers), math.ceil(len(batches) / world_size)


def find_filler(reader: BatchReader) -> Batch:
    """A usable batch of one clip, for a rank that must compute and has nothing to compute on.

    Raises:
        ShardError: none of the first samples can be used.
    """
    refs = (SampleRef(number, shard, row) for number, index in enumerate(reader.indexes)
            for shard, count in enumerate(index.counts) for row in range(count))
    reason = "no samples"
    for ref in itertools.islice(refs, 1000):
        batch = reader[[ref]]
        if len(batch):
            return batch
        reason = batch.skipped[0].reason
    raise ShardError(f"none of the first samples of {reader.indexes[0].folder} can be used, the last because: {reason}")


def set_up_worker(worker: int) -> None:
    """In each loader process: end with the trainer."""
    # torch looks for the trainer too, but takes whoever is its parent at this moment for it: a worker whose trainer was
    # killed while it started would never end.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: multiprocessing.process.BaseProcess | None) -> None:
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _batches(reader: BatchReader, sampler: object, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """The batches that `sampler` names, in its order; closing the iterator ends the workers."""
    loader: DataLoader[Batch] = DataLoader(
        reader, sampler=sampler, batch_size=None, num_workers=workers, pin_memory=pin_memory,  # type: ignore[arg-type]
        prefetch_factor=4 if workers else None, worker_init_fn=set_up_worker,
        # Forked children of a process that runs gloo or CUDA threads can hang.
        multiprocessing_context="spawn" if workers else None)
    others = multiprocessing.active_children()
    # The workers inherit the mask. Launchers and Ctrl-C signal them too, from their first moment on, while the trainer
    # still needs them to finish its step.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        if workers:
            resource_tracker.ensure_running()  # whose start lets SIGTERM and SIGINT through again
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started = [child for child in multiprocessing.active_children() if child not in others]
    at_exit = partial(_kill, started)
    if started:
        atexit.register(at_exit)
    try:
        yield from iterator
    except Exception as error:
        if not workers:
            raise
        # Its frames in this process would keep the other workers alive.
        error.with_traceback(None)
        died = LoaderError.of(error) if isinstance(error, (RuntimeError, ListenError)) else None
        raise died or _message_first(error) from None
    finally:
        del iterator  # ends the workers
        for worker in started:  # but not one that waits for a lock of a killed one
            worker.kill()
        atexit.unregister(at_exit)


def _kill(workers: list[multiprocessing.process.BaseProcess]) -> None:
    """At the program's end. Python would send what is left SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each
    for worker in workers:
        worker.kill()


def _message_first(error: Exception) -> Exception:
    """What a worker raised; torch hands it on with its traceback before its message, we the other way round."""
    told, kind = str(error), type(error)
    *_, last = re.split(rf"^(?:[\w.]+\.)?{kind.__name__}: ", told, flags=re.MULTILINE)
    return kind(f"{last.rstrip()}\n\n{told}") if last != told else error
