"""One rank of test_loading.py: loads an LLM in each layout and writes down how its memory grew.

    python -m tests.distributed.loading_worker FOLDER OUT NAME:KEY=VALUE,KEY=VALUE …
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.engine.sharding import sharding_for
from listen_dist.models.llm import load_llm
from listen_dist.schema import Config


def anonymous() -> int:
    """Bytes of this process's own memory; mapped files, which ranks share, are not in it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


class Peak(threading.Thread):
    """Watches `anonymous` a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = anonymous()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.highest = max(self.highest, anonymous())


def load(config: Config) -> dict[str, Any]:
    gc.collect()
    dist.barrier()
    before, watch = anonymous(), Peak()
    watch.start()
    sharding = sharding_for(config)
    llm = sharding.load(lambda: load_llm(config.model), torch.device("cpu"))
    watch.done.set()
    watch.join()
    with torch.no_grad():
        logits = llm(input_ids=torch.arange(8)[None]).logits
    return {"peak": watch.highest - before, "after": anonymous() - before, "held": sharding.bytes_held(),
            "logits": logits[0, -1, :8].tolist(), "dtype": str(logits.dtype)}


def main() -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401  its own memory is not the LLM's

    config_file, out, *scenarios = sys.argv[1:]
    found = {}
    for scenario in scenarios:
        name, _, words = scenario.partition(":")
        found[name] = load(configuration.load(config_file, words.split(",")))
    (Path(out) / f"loaded-{dist.rank()}.json").write_text(json.dumps(found))
    dist.shutdown()


if __name__ == "__main__":
    main()
