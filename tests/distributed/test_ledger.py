"""Killed at random moments and gone on with other numbers of ranks and workers, every sample counts exactly once.

The count of kills is three here; `make ledger` takes twenty.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from listen_dist.engine import checkpoint
from tests import forking, tiny

KILLS = int(os.environ.get("LEDGER_KILLS", "3"))
SHAPES = [(2, 0), (1, 2), (3, 0), (1, 0), (2, 2), (3, 2)]
"""Ranks and workers a rank, in turns."""
CLIPS = 80

pytestmark = pytest.mark.timeout(600 + 330 * KILLS)


def start(world: int, workers: int, end: str, config: Path, run: Path, number: int) -> list[forking.Rank]:
    words = ("tests.distributed.ledger_worker", [str(config), str(run), str(workers), end])
    return forking.start(world, forking.be_program, words, run / f"logs-{number}")


def steps_taken(run: Path) -> list[int]:
    file = run / "steps.log"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.is_file() else []


def kill_one(ranks: list[forking.Rank], run: Path, draw: random.Random) -> None:
    """SIGKILL one rank at a random moment after the run took a step more, then whatever is left of it."""
    before = len(steps_taken(run))
    try:
        limit = time.monotonic() + 300
        while len(steps_taken(run)) == before:
            for rank in ranks:
                assert rank.process.is_alive(), rank.output[-4000:]
            assert time.monotonic() < limit, "no step within 300 s"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        victim = draw.choice(ranks)
        assert victim.process.is_alive()
        loaders = psutil.Process(victim.pid).children(recursive=True)
        victim.process.kill()
        victim.process.join(10)
        _, orphans = psutil.wait_procs(loaders, timeout=60)
        assert not orphans, "loader processes outlive their rank"
    finally:
        for rank in ranks:
            rank.kill()


def test_every_sample_counts_once_over_kills_ranks_and_workers(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    index = tiny.write_set(tmp_path / "set", tiny.speech_records(CLIPS, "clip"),
                           seconds=[0.1 + i * 7 % 11 * 0.05 for i in range(CLIPS)])
    tree = tiny.config_tree(tiny_world)
    tree["data"] |= {"train": [{"path": str(index.folder)}], "batch_tokens": 80, "window": 16}
    tree["train"] |= {"save_every": 2}
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree))
    run.mkdir()
    draw = random.Random(7)
    for number in range(KILLS):
        kill_one(start(*SHAPES[number % len(SHAPES)], "go", config, run, number), run, draw)
    ranks = start(*SHAPES[KILLS % len(SHAPES)], "finish", config, run, KILLS)
    try:
        for rank in ranks:
            rank.wait(400).check()
    finally:
        for rank in ranks:
            rank.kill()
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    state, taken = checkpoint.read_state(found), steps_taken(run)
    counts = load_file(found / "trainables.safetensors")["counts"]
    passes = state.loader.samples // index.samples
    print(f"{KILLS} kills: {state.step} steps counted, {len(taken) - len(set(taken))} were lost and done again; "
          f"{passes} passes over {len(counts)} samples; times each counted: "
          f"{ {int(value): int((counts == value).sum()) for value in counts.unique()} }")
    assert torch.equal(counts, torch.full((index.samples,), float(passes)))
    assert state.loader.samples == passes * index.samples > 0
    # A kill may come between a checkpoint and the line that notes its step, so a line may be missing.
    assert set(taken) <= set(range(1, state.step + 1)) and state.step > 0
