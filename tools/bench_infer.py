"""Clips a second of batched inference against one clip at a time, in one run.

    python tools/bench_infer.py --checkpoint runs/quickstart --manifest assets/manifests/asr.test.jsonl --json

The rival is how LiSTEN's research code generates: one clip at a time, each filled up to the encoder's 30 s window
with silence, all of whose audio tokens the LLM attends to; same weights, prompts, text and type. Both ways generate
the same tokens' number for each clip, that of its transcript, so that neither wins by saying less. Decoding of
the files is not timed. Each way runs once to warm up on a few clips, then over all clips.

Real-time factor: seconds of computing for a second of audio. First token: from the decoded audio of one clip to the
first token of its answer, median over clips. Peak memory: of the process so far on a CPU (VmHWM, which cannot sink from
one row to the next), of the allocator since the row began on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os.path import expanduser

import numpy as np
import torch

from listen_dist import Listener, exits
from listen_dist.command_line import user_path
from listen_dist.data.collate import collate
from listen_dist.data.decode import decode_audio
from listen_dist.data.manifest import read_manifest
from listen_dist.inference.listener import Ask
from listen_dist.structures import SAMPLE_RATE

BATCHES = (1, 8, 32)
WARM_UP = 2
FIRST_TOKENS = 8
"""Clips that the latency of the first token is measured on."""


@dataclass(frozen=True)
class Row:
    """One way of generating, over all clips."""

    way: str
    batch: int
    clips_per_second: float
    real_time_factor: float
    first_token_seconds: float
    peak_mib: float


class Bench:
    """Clips ready to be answered.

    Args:
        waves: float32 [S] each.
        texts: their transcripts, for the number of tokens to generate.
    """

    def __init__(self, listener: Listener, waves: Sequence[np.ndarray], texts: Sequence[str]) -> None:
        self._listener = listener
        self._parts = listener.parts
        self._k = listener.config.pool.k
        self._waves = waves
        self._limits = [len(self._parts.text.target_ids(text)) for text in texts]
        self._seconds = sum(map(len, waves)) / SAMPLE_RATE

    def measure(self, way: str, batch: int) -> Row:
        """Time `batched` (true lengths, sorted by length) or `padded` to 30 s."""
        filled = way == "padded"
        order = sorted(range(len(self._waves)), key=lambda i: len(self._waves[i]))
        groups = [order[at : at + batch] for at in range(0, len(order), batch)]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._run(groups[0][:WARM_UP], filled)
        seconds = self._timed(lambda: [self._run(group, filled) for group in groups])
        first = statistics.median(self._timed(lambda i=i: self._run([i], filled, tokens=1))  # type: ignore[misc]
                                  for i in order[:: max(1, len(order) // FIRST_TOKENS)])
        return Row(way, batch, len(self._waves) / seconds, seconds / self._seconds, first, peak_mib())

    def _run(self, group: Sequence[int], filled: bool, tokens: int | None = None) -> None:
        samples = []
        for i in group:
            wave = self._waves[i]
            if filled:
                wave = np.pad(wave, (0, 30 * SAMPLE_RATE - len(wave)))
            samples.append(self._listener.prepare(wave, Ask()))
        limits = [tokens or self._limits[i] for i in group]
        # No EOS before a row's own limit, where the model puts one.
        self._parts.model.generate(collate(samples, is_features=False, skipped=[]), self._k, limits,
                                   min_new_tokens=max(limits))

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Clips/s at batch 8 over those of the rival."""
    speed = {(row.way, row.batch): row.clips_per_second for row in rows}
    return {"over_one_at_a_time": speed["batched", 8] / speed["padded", 1],
            "over_one_at_a_time_at_batch_1": speed["batched", 1] / speed["padded", 1]}


def table(rows: Sequence[Row]) -> str:
    lines = ["| | batch | clips/s | real-time factor | first token (s) | peak (MiB) |", "|---|---|---|---|---|---|"]
    lines += [f"| {row.way} | {row.batch} | {row.clips_per_second:.2f} | {row.real_time_factor:.3f} | "
              f"{row.first_token_seconds:.3f} | {row.peak_mib:.0f} |" for row in rows]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=expanduser, required=True, help="export, checkpoint or run folder")
    parser.add_argument("--manifest", required=True, type=user_path, help="manifest of `asr` clips")
    parser.add_argument("--clips", type=int, default=32, help="clips of it, evenly spread (default 32)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    return exits.run(lambda: measure_all(parse_arguments(argv)))


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure each way on the same clips and print the figures."""
    records = list(read_manifest(arguments.manifest))
    records = records[:: max(1, len(records) // arguments.clips)][: arguments.clips]
    waves = [decode_audio(record.audio[0]) for record in records]
    listener = Listener.from_checkpoint(arguments.checkpoint, device=arguments.device)
    bench = Bench(listener, waves, [record.answers[0] for record in records])
    with torch.inference_mode():
        rows = [bench.measure("padded", 1), *(bench.measure("batched", batch) for batch in BATCHES)]
    result = {"device": str(listener.parts.model.device), "threads": torch.get_num_threads(), "clips": len(waves),
              "seconds": sum(map(len, waves)) / SAMPLE_RATE, "dtype": listener.config.model.dtype,
              "rows": [asdict(row) for row in rows], "summary": summary(rows)}
    print(json.dumps(result, indent=1) if arguments.json else f"{table(rows)}\n{result['summary']}")


if __name__ == "__main__":
    sys.exit(main())
