"""Kill a run on two ranks at random moments, again and again, and compare it with an unbroken one.

    python -m tests.distributed.fault_campaign [--kills 20] [--seed 0]

Every step saves, so that some kills meet the writing thread. Ends with an error at the first difference.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from tests import tiny
from tests.distributed import fault_worker
from tests.distributed.test_faults import LIMIT, assert_unbroken

STEPS = 60


def words(world: tiny.Tiny, folder: Path) -> list[object]:
    return ["--config", world.config_file, f"run_dir={folder / 'run'}", "train.batches_per_step=2",
            "train.save_every=1", f"train.max_steps={STEPS}"]


def steps_done(folder: Path) -> int:
    """The last step that was reported; a line may be half written just now."""
    metrics = folder / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def kill_once(world: tiny.Tiny, folder: Path, chance: random.Random) -> str:
    """Start, let it take a few steps, kill one rank at a random moment and the other a little later."""
    before = steps_done(folder)
    ranks = fault_worker.start(2, words(world, folder), folder)
    goal, deadline = before + chance.randint(0, 3), time.monotonic() + LIMIT
    while steps_done(folder) < goal and all(rank.process.is_alive() for rank in ranks):
        assert time.monotonic() < deadline, ranks[0].output[-3000:]
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.4 if goal > before else 5.0))
    order = chance.sample(ranks, 2)
    for rank in order:
        rank.kill()
        time.sleep(chance.uniform(0, 0.1))
    return f"rank {ranks.index(order[0])} first, after step {steps_done(folder)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as root:
        world, folder, unbroken = tiny.build(Path(root) / "tiny"), Path(root) / "killed", Path(root) / "unbroken"
        for rank in fault_worker.start(2, words(world, unbroken), unbroken):
            rank.wait(LIMIT).check()
        for kill in range(arguments.kills):
            print(f"kill {kill + 1} of {arguments.kills}: {kill_once(world, folder, chance)}", flush=True)
        for rank in fault_worker.start(2, words(world, folder), folder):
            rank.wait(LIMIT).check()
        assert_unbroken(folder, unbroken)
        print(f"{STEPS} losses, clips and the last weights are those of the unbroken run, to the last digit")


if __name__ == "__main__":
    main()
