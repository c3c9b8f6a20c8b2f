#!/usr/bin/env python3
"""Measure the data pipeline: speed against its floor and its rivals, padding, balance, start-up at scale, memory.

    python tools/bench_data.py --config configs/quickstart.yaml --json     # the table, on one core
    python tools/bench_data.py --scale 100000                              # start and resume of a made-up index
    python tools/bench_data.py --memory 50000                              # resident memory over so many batches

The sets are those of `data.train`, without stored features. Four pipelines take turns on the same clips (as many as
`--clips`, drawn from the sets in the config's shares and written as shards of their own), in one process on one
thread, each round in another order. Figures are medians over the rounds, in processor time; `over_floor` is the median
of the rounds' own ratios, since a busy machine slows what runs at the same time alike:

    full         ours: plan, read, decode, log-mel, text, collate
    floor        what can't be left out: the tars read in sequence, FLAC decoded, log-mel
    webdataset   the library's own reading and batching, with the same decode, log-mel, text and collate
    loose files  torch DataLoader over one FLAC and one JSON file a clip, with the same stages
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from listen_dist import config as configuration
from listen_dist import exits
from listen_dist.command_line import ConfigParser
from listen_dist.data.collate import Prepared, collate
from listen_dist.data.decode import decode_audio
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader, training_steps
from listen_dist.data.manifest import record_from_json
from listen_dist.data.mixture import Mixture
from listen_dist.data.schedule import TokenCost, plan_batches
from listen_dist.data.shard_entries import ShardEntry
from listen_dist.data.shard_writer import WrittenShard, shard_name, write_index, write_shard
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.data.text_cost import learn_text_tokens
from listen_dist.engine.meter import imbalance
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import Config, SetConfig
from listen_dist.structures import ENCODER_RATE, SAMPLE_RATE, Batch, LoaderState

BATCH = 16
"""Clips a batch of the rivals, which know no token budget."""


@dataclass(frozen=True)
class Stages:
    """What all pipelines share."""

    config: Config
    log_mel: LogMel
    text: TextEncoder
    indexes: list[ShardIndex]

    @staticmethod
    def build(config: Config) -> Stages:
        config = replace(config, data=replace(config.data, stored_features=False, workers=0))
        return Stages(config, LogMel.from_pretrained(config.model.speech_encoder),
                      TextEncoder(load_tokenizer(config.model.llm), config.model),
                      [ShardIndex.load(entry.path) for entry in config.data.train])

    def prepare(self, flac: bytes, record_json: bytes) -> Prepared:
        record = record_from_json(record_json, need_audio=False)
        wave = decode_audio(flac, self.config.data.max_seconds)
        return Prepared(record, self.log_mel(wave), self.text.after_ids(record),
                        self.text.target_ids(record.answers[0]), len(wave) / SAMPLE_RATE)

    def cost(self) -> TokenCost:
        """As the trainer has it, for a projector whose windows are `projector.window` seconds."""
        frame = self.text.frame
        frames = max(1, round(self.config.projector.window * ENCODER_RATE))
        fixed = self.config.pool.k_max + len(frame.bos) + len(frame.before) + self.text.fixed_after + 1
        return TokenCost(fixed, ENCODER_RATE / frames, tuple(learn_text_tokens(index, self.text)
                                                             for index in self.indexes))

    def tars(self) -> list[str]:
        return [str(index.folder / entry.name) for index in self.indexes for entry in index.shards]

    def mixture(self) -> Mixture:
        return Mixture(self.indexes, self.config.data.train, self.config.train.seed, self.config.data.temperature)

    def steps(self, per_step: int = 1) -> Iterator[tuple[list[Batch], LoaderState]]:
        """Our pipeline, as if all ranks were one."""
        data, seed = self.config.data, self.config.train.seed
        reader = BatchReader(self.indexes, self.log_mel, self.text, data, with_targets=True)
        return training_steps(reader, self.mixture(), self.cost(), data, seed, per_step, 0, 1, LoaderState())

    def narrowed(self, clips: int, folder: Path) -> Stages:
        """The same over a set of its own of so many clips, drawn as training draws them."""
        refs = self.mixture().window(0, clips)
        samples = []
        for number, ref in enumerate(refs):
            sample = self.indexes[ref.set].read_sample(ref.shard, ref.row)
            # A small set comes again; in one shard set an id may not.
            samples.append(replace(sample, record=replace(sample.record, id=f"{number}-{sample.record.id}")))
        shards = [write_shard(folder / shard_name(start // 100), samples[start : start + 100])
                  for start in range(0, clips, 100)]
        write_index(folder, [shard for shard in shards if shard], 0, None)
        # A window for a turn: then every turn of every pipeline is over the same clips.
        data = replace(self.config.data, train=[SetConfig(str(folder))], window=clips)
        return replace(self, config=replace(self.config, data=data), indexes=[ShardIndex.load(folder)])


# --- four pipelines: each yields seconds of audio and clips, a batch at a time --------------------------


def full(stages: Stages) -> Iterator[list[float]]:
    for batches, _ in stages.steps():
        yield from (batch.seconds for batch in batches)


def floor(stages: Stages) -> Iterator[list[float]]:
    for tar in itertools.cycle(stages.tars()):
        with tarfile.open(tar, "r|") as members:
            for member in members:
                content = members.extractfile(member)
                if member.name.endswith(".flac") and content:
                    wave, _ = soundfile.read(io.BytesIO(content.read()), dtype="float32")
                    stages.log_mel(wave)
                    yield [len(wave) / SAMPLE_RATE]


def plain_webdataset(stages: Stages) -> Iterator[list[float]]:
    pipeline = webdataset.WebDataset(stages.tars(), shardshuffle=False, empty_check=False).shuffle(1000)
    prepared = pipeline.map(lambda sample: stages.prepare(sample["flac"], sample["json"]))
    for batch in prepared.batched(BATCH, collation_fn=lambda rows: collate(rows, False, [])).repeat():
        yield batch.seconds


class LooseFiles(Dataset[Prepared]):
    """One FLAC and one JSON file a clip."""

    def __init__(self, folder: Path, stages: Stages) -> None:
        self._names, self._stages = sorted(folder.glob("*.flac")), stages

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, place: int) -> Prepared:
        name = self._names[place]
        return self._stages.prepare(name.read_bytes(), name.with_suffix(".json").read_bytes())


def loose_files(stages: Stages, folder: Path) -> Iterator[list[float]]:
    while True:
        for batch in DataLoader(LooseFiles(folder, stages), BATCH, shuffle=True,
                                collate_fn=lambda rows: collate(rows, False, [])):
            yield batch.seconds


def unpack(stages: Stages, folder: Path) -> None:
    for number, tar in enumerate(stages.tars()):
        for sample in webdataset.WebDataset([tar], shardshuffle=False, empty_check=False):
            for suffix in ("flac", "json"):
                (folder / f"{number}-{sample['__key__']}.{suffix}").write_bytes(sample[suffix])


def measure_speed(stages: Stages, rounds: int, clips: int) -> tuple[list[dict[str, float | str]], dict[str, Any]]:
    """One row a pipeline, and how near ours comes to the floor; they take turns, `clips` clips a turn."""
    with tempfile.TemporaryDirectory() as shards, tempfile.TemporaryDirectory() as loose:
        stages = stages.narrowed(clips, Path(shards))
        unpack(stages, Path(loose))
        streams = {"full": full(stages), "floor": floor(stages), "webdataset": plain_webdataset(stages),
                   "loose files": loose_files(stages, Path(loose))}
        turns: list[dict[str, Turn]] = []
        for number in range(rounds + 1):
            order = list(streams)[number % len(streams):] + list(streams)[: number % len(streams)]
            measured = {key: _turn(streams[key], clips) for key in order}
            if number:  # the first round warms up
                turns.append(measured)
        bytes_a_second = (sum(entry.bytes for index in stages.indexes for entry in index.shards)
                          / sum(index.seconds for index in stages.indexes))
        rows = [_row(key, [turn[key] for turn in turns], bytes_a_second) for key in streams]
    ratios = [turn["full"].clips_per_second / turn["floor"].clips_per_second for turn in turns]
    return rows, {"over_floor": statistics.median(ratios), "over_floor_rounds": [round(ratio, 3) for ratio in ratios]}


@dataclass(frozen=True)
class Turn:
    """What one pipeline did in one round."""

    clips: int
    audio: float
    """Seconds."""
    processor: float
    """Seconds."""

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.processor


def _turn(stream: Iterator[list[float]], clips: int) -> Turn:
    start, done, audio = time.process_time(), 0, 0.0
    while done < clips:
        seconds = next(stream)
        done, audio = done + len(seconds), audio + sum(seconds)
    return Turn(done, audio, time.process_time() - start)


def _row(name: str, turns: list[Turn], bytes_a_second: float) -> dict[str, float | str]:
    audio = statistics.median(turn.audio / turn.processor for turn in turns)
    return {"pipeline": name, "clips_per_second": statistics.median(turn.clips_per_second for turn in turns),
            "audio_hours_per_second": audio / 3600, "megabytes_per_second": audio * bytes_a_second / 1e6}


# --- padding and balance -----------------------------------------------------------------------------------


def measure_balance(stages: Stages, ranks: int, steps: int) -> dict[str, float]:
    """Padding share and token imbalance over ranks, from the true numbers of tokens of the config's own mixture."""
    cost, real, padded = stages.cost(), [], 0
    for batches, _ in itertools.islice(stages.steps(ranks), steps):
        rows = [_tokens(batch, stages, cost.audio_tokens_per_second) for batch in batches]
        real.append([float(row.sum()) for row in rows])
        padded += sum(int(row.max()) * len(row) for row in rows)
    table = torch.tensor(real).T  # [ranks, steps]
    return {"padding_share": 1 - float(table.sum()) / padded, "token_imbalance": imbalance(table)}


def _tokens(batch: Batch, stages: Stages, audio_rate: float) -> np.ndarray:
    """True numbers of tokens of the LLM's input, a row each."""
    fixed = stages.config.pool.k_max + len(stages.text.frame.bos) + len(stages.text.frame.before)
    audio = np.ceil(np.array(batch.seconds) * audio_rate)
    text = [len(after) + len(target) for after, target in zip(batch.after_ids, batch.target_ids, strict=True)]
    return fixed + audio + np.array(text)


# --- scale -------------------------------------------------------------------------------------------------


def write_made_up_index(folder: Path, shards: int, rows: int) -> None:
    """An index.json of so many shards; one sparse tar and one sidecar under the names of all."""
    random = np.random.default_rng(0)
    columns = {"id": [f"s{i}" for i in range(rows)], "offset": [i * 100_000 for i in range(rows)],
               "bytes": [90_000] * rows, "seconds": random.uniform(1, 20, rows).tolist(), "task": ["asr"] * rows,
               "text_chars": random.integers(10, 200, rows).tolist()}
    sidecar = json.dumps(columns).encode()
    digest = hashlib.sha256(sidecar).hexdigest()
    entries = [ShardEntry(f"shard-{n:06d}.tar", rows, rows * 100_000, 10.5 * rows, f"{n:064x}", digest, {"asr": rows})
               for n in range(shards)]
    write_index(folder, [WrittenShard(entry, {"en": rows}) for entry in entries], 0, None)
    for n, entry in enumerate(entries):
        tar, table = folder / entry.name, folder / entry.sidecar
        if n % 10_000:  # a file system allows so many names for one file
            os.link(folder / entries[n - n % 10_000].name, tar)
            os.link(folder / entries[n - n % 10_000].sidecar, table)
        else:
            table.write_bytes(sidecar)
            tar.touch()
            os.truncate(tar, entry.bytes)


def measure_scale(shards: int, rows: int) -> dict[str, float]:
    """Start, resume and cost of a step for a made-up index of so many shards."""
    with tempfile.TemporaryDirectory() as name:
        # In another process, whose memory is not ours.
        writer = multiprocessing.get_context("fork").Process(
            target=write_made_up_index, args=(Path(name), shards, rows))
        writer.start()
        writer.join()
        before_load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu = time.perf_counter(), time.process_time()
        index = ShardIndex.load(name)
        loaded = time.perf_counter() - start
        results: dict[str, float] = {"shards": shards, "samples": index.samples, "load_seconds": loaded,
                                     "load_cpu_seconds": time.process_time() - cpu}
        mixture = Mixture([index], [SetConfig(name)], 0)
        for what, window in (("first_batch", 0), ("resume", index.samples // 2048 // 2)):
            before, before_cpu = time.perf_counter(), time.process_time()
            plan = plan_batches(mixture, TokenCost(30, 10.0), 2048, 2048, 0, LoaderState(window, 3, window * 2048))
            next(plan)
            results[f"{what}_seconds"] = time.perf_counter() - before
            results[f"{what}_cpu_seconds"] = time.process_time() - before_cpu
        before_batches = time.process_time()
        batches = list(itertools.islice(plan, 1000))
        results["plan_microseconds_per_sample"] = 1e6 * (time.process_time() - before_batches) / sum(
            len(refs) for refs, _ in batches)
        results["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results["peak_mib_before_load"] = before_load / 1024
        return results


# --- memory ------------------------------------------------------------------------------------------------


def measure_memory(stages: Stages, batches: int, workers: int) -> list[dict[str, float]]:
    """Resident memory of this process and its loader processes, at twenty places of a long run."""
    stages = replace(stages, config=replace(stages.config, data=replace(
        stages.config.data, workers=workers, batch_tokens=64, window=256)))
    rows, process = [], psutil.Process()
    for done, _ in enumerate(itertools.islice(stages.steps(), batches), 1):
        if done % max(1, batches // 20) == 0:
            family = [process, *process.children(recursive=True)]
            rows.append({"batches": done, "mib": sum(member.memory_info().rss for member in family) / 2**20})
            print(f"{done} batches: {rows[-1]['mib']:.0f} MiB", file=sys.stderr, flush=True)
    return rows


def machine() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").is_file() else []
    return (f"{names[0] if names else platform.processor()}, {len(names)} cores; Python {platform.python_version()}, "
            f"torch {torch.__version__}, webdataset {webdataset.__version__}; {time.strftime('%Y-%m-%d')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    return exits.run(lambda: measure(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each pipeline (default 15)")
    parser.add_argument("--clips", type=int, default=300, help="clips a turn (default 300)")
    parser.add_argument("--ranks", type=int, default=2, help="for padding and balance (default 2)")
    parser.add_argument("--steps", type=int, default=100, help="for padding and balance (default 100)")
    parser.add_argument("--scale", type=int, metavar="SHARDS", help="instead: a made-up index of so many shards")
    parser.add_argument("--rows", type=int, default=1000, help="samples a made-up shard (default 1000)")
    parser.add_argument("--memory", type=int, metavar="BATCHES", help="instead: memory over so many small batches")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of --memory (default 0)")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> None:
    """Measure what is asked for, and print the figures."""
    torch.set_num_threads(1)
    if options.scale:
        print(json.dumps({"machine": machine(), "summary": measure_scale(options.scale, options.rows)}, indent=1))
        return
    stages = Stages.build(configuration.load(options.config, options.overrides))
    if options.memory:
        rows = measure_memory(stages, options.memory, options.workers)
        growth = rows[-1]["mib"] / rows[len(rows) // 4]["mib"] - 1
        print(json.dumps({"machine": machine(), "rows": rows, "summary": {"growth_after_a_quarter": growth}}, indent=1))
        return
    rows, speed = measure_speed(stages, options.rounds, options.clips)
    summary = speed | measure_balance(stages, options.ranks, options.steps)
    print(report(rows, summary, options.json))


def report(rows: list[dict[str, float | str]], summary: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps({"machine": machine(), "rows": rows, "summary": summary}, indent=1)
    lines = ["| pipeline | clips/s | audio h/s | MB/s |", "|---|---|---|---|"]
    lines += ["| {pipeline} | {clips_per_second:.0f} | {audio_hours_per_second:.3f} | {megabytes_per_second:.2f} |"
              .format(**row) for row in rows]
    figures = (f"{key}: {value:.3f}" for key, value in summary.items() if isinstance(value, float))
    return "\n".join([machine(), *lines, *figures])


if __name__ == "__main__":
    sys.exit(main())
