"""One rank of test_rival_runs.py: trains, breaks off, goes on and evaluates, for each rival in turn.

    python -m tests.distributed.rival_worker CONFIG OUT NAME:KEY=VALUE;KEY=VALUE …

The ranks meet over the file store that STORE names, once for all programs.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed

from listen_dist import dist, evaluate, train

WORDS = ("train.batches_per_step=2", "train.schedule=constant", "train.log_every=1", "train.save_every=2",
         "train.checksum_every=1", "data.batch_prompts=20")


def run(config_file: str, folder: Path, words: list[str]) -> list[int]:
    """Four steps at once; two steps, then two more; the scores of the second run. Exit codes."""
    def train_for(steps: int, name: str, *more: str) -> int:
        torch.distributed.barrier()  # programs of their own would start when rank 0 has saved
        return train.main(["--config", config_file, f"run_dir={folder / name}", f"train.max_steps={steps}",
                           *WORDS, *words, *more])

    codes = [train_for(4, "unbroken"), train_for(2, "resumed"), train_for(4, "resumed")]
    if "lora.rank=8" in words:  # the same once more under the LLM's other layouts
        codes += [train_for(4, "replicated", "parallel.llm=replicated"),
                  train_for(4, "fsdp2", "parallel.backend=fsdp2")]
    torch.distributed.barrier()
    codes.append(evaluate.main(["--config", str(folder / "resumed/config.yaml"), "--out", str(folder / "resumed")]))
    return codes


def main() -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # where the watchdog meets
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    shutdown, dist.shutdown = dist.shutdown, lambda failed=False: None  # every program would leave the group at its end
    config_file, out, *scenarios = sys.argv[1:]
    codes = {}
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        codes[name] = run(config_file, Path(out) / name, words.split(";"))
    (Path(out) / f"codes-{dist.rank()}.json").write_text(json.dumps(codes))
    shutdown()


if __name__ == "__main__":
    main()
