"""One rank of test_decoding.py: decodes a test set and writes down what it answered itself and what all did.

    python -m tests.distributed.decoding_worker CONFIG OUT NAME:KEY=VALUE;KEY=VALUE …

A name that ends in "report" also opens the pool. With KILL_AFTER=n the process kills itself when it has added
n batches to its partial file. The ranks meet over the file store that STORE names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.shards import ShardIndex
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.evaluate import decode_split
from listen_dist.evaluation import report
from listen_dist.evaluation.decoding import Decoder
from listen_dist.evaluation.placement import placed
from listen_dist.evaluation.predictions import PartialFile, Prediction, to_lines
from listen_dist.evaluation.report import Evaluated
from listen_dist.schema import Config
from listen_dist.structures import Batch


class Watched(Decoder):
    """Notes which samples this process answers, fillers included."""

    def choose(self, batch: Batch) -> list[Prediction]:
        answered.extend(batch.ids)
        return super().choose(batch)

    def generate(self, batch: Batch) -> list[Prediction]:
        answered.extend(batch.ids)
        return super().generate(batch)


answered: list[str] = []


def die_after(batches: int) -> None:
    plain_add, added = PartialFile.add, 0

    def add(self: PartialFile, *words: Any) -> None:
        nonlocal added
        plain_add(self, *words)
        added += 1
        if added == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    PartialFile.add = add  # type: ignore[method-assign]


def run(parts: Parts, config: Config, out: Path) -> None:
    answered.clear()
    with placed(parts) as whole:
        decoder = Watched(parts, config.eval, config.pool.k, whole)
        predictions, skipped = decode_split(decoder, config.data.test, {"beams": config.eval.beams}, out / "partial")
        if out.name.endswith("report"):
            index = ShardIndex.load(config.data.test[0].path)
            facts = {"split": "test", "k": config.pool.k, "checkpoint": "none", "step": 0, "tasks": {},
                     "data_fingerprints": {"test": index.fingerprint}}
            report.make(Evaluated(out, config, facts, [asdict(row) for row in predictions]), parts)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"predictions-{dist.rank()}.jsonl").write_text(to_lines(predictions))
    (out / f"notes-{dist.rank()}.json").write_text(
        json.dumps({"answered": answered, "whole": whole, "skipped": len(skipped)}))


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    if "KILL_AFTER" in os.environ:
        die_after(int(os.environ["KILL_AFTER"]))
    config_file, out, *scenarios = sys.argv[1:]
    parts = assemble(configuration.load(config_file), torch.device("cpu"))
    parts.model.eval()
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        config = configuration.load(config_file, [word for word in words.split(";") if word])
        object.__setattr__(parts, "config", config)  # the same models, decoded another way
        run(parts, config, Path(out) / name)
    dist.shutdown()


if __name__ == "__main__":
    main()
