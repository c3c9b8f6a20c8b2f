"""What goes wrong in long runs, done to real ranks: killed, stopped, stuck, slow, signalled, fed with NaN.

The truth is the session's unbroken run; fp32 on the same number of ranks must agree to the last digit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from listen_dist.engine.signals import GRACE
from listen_dist.exits import LOST_CONTACT, RESUMABLE
from tests import forking, launching, tiny
from tests.distributed import fault_worker
from tests.distributed.test_resume import STEPS, read_metrics, reported

pytestmark = pytest.mark.timeout(2400)

LIMIT = 400.0
"""Seconds for one launch, on a busy machine."""


def words(tiny_world: tiny.Tiny, folder: Path, *more: str) -> list[Any]:
    return fault_worker.words(tiny_world.config_file, folder, *more)


def run_faulty(tiny_world: tiny.Tiny, folder: Path, fault: str, *more: str) -> list[launching.Finished]:
    """Two ranks with a fault, to their end; when one is killed, so is the other soon after, as by a launcher."""
    ranks = fault_worker.start(2, words(tiny_world, folder, *more), folder, fault)
    try:
        if "kill" in fault:
            deadline = time.monotonic() + LIMIT
            while all(rank.process.is_alive() for rank in ranks) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.3)
            for rank in ranks:
                rank.kill()
        return [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def assert_unbroken(folder: Path, unbroken: Path) -> None:
    """The same losses, the same clips in every step, and the same place in the data at the end."""
    ours, theirs = read_metrics(folder / "run"), read_metrics(unbroken / "run")
    assert sorted(ours) == sorted(theirs) == list(range(1, max(theirs) + 1))
    for step, line in theirs.items():
        assert reported(ours[step]) == reported(line), f"step {step}"
    assert clips(folder) == clips(unbroken), "clips were lost or doubled"
    states = [path / "run/checkpoints" / f"step-{max(theirs):06d}/state.json" for path in (folder, unbroken)]
    state, expected = (json.loads(path.read_text()) for path in states)
    assert state["loader"] == expected["loader"]
    assert state["sha256"]["trainables.safetensors"] == expected["sha256"]["trainables.safetensors"]


def clips(folder: Path) -> dict[tuple[int, int], list[list[str]]]:
    """The clips of each step and rank; a step that was done again must have had the same."""
    found: dict[tuple[int, int], list[list[str]]] = {}
    for rank in (0, 1):
        for line in (folder / f"clips-{rank}").read_text().splitlines():
            step, ids = json.loads(line)
            assert found.setdefault((step, rank), ids) == ids
    return found


def test_a_slow_rank_a_jumping_clock_and_a_second_run_change_nothing(tiny_world: tiny.Tiny, unbroken: Path,
                                                                     tmp_path: Path) -> None:
    """Rank 1 takes 0.2 s longer for each forward, some ten times as long; every reading of the clock jumps.

    Meanwhile the same command is given once more: that run ends at once, on both of its ranks.
    """
    ranks = fault_worker.start(2, words(tiny_world, tmp_path), tmp_path, "slow+clock:1:0")
    second: list[forking.Rank] = []
    try:
        wait_for(lambda: (tmp_path / "run/train.log").is_file(), ranks[0].log)
        second = fault_worker.start(2, words(tiny_world, tmp_path), tmp_path / "second")
        refused = [rank.wait(LIMIT) for rank in second]
        ended = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in [*ranks, *second]:
            rank.kill()
    for one in refused:
        assert one.code == 2 and f"in use by process {ranks[0].pid} on " in one.first_error, one.output[-3000:]
    assert [one.code for one in ended] == [0, 0], ended[0].output[-3000:] + ended[1].output[-3000:]
    assert_unbroken(tmp_path, unbroken)
    assert "no progress" not in ended[0].output
    times = [line["time"] for line in read_metrics(tmp_path / "run").values()]
    assert max(times) - min(times) > 50_000, "the clock did not jump"
    assert all(0 < line["elapsed_seconds"] < LIMIT for line in read_metrics(tmp_path / "run").values())


def test_killed_in_every_part_of_a_step_and_resumed(tiny_world: tiny.Tiny, unbroken: Path, tmp_path: Path) -> None:
    """One run, killed five times; then its newest checkpoint is damaged; then it finishes."""
    checkpoints = tmp_path / "run/checkpoints"
    for fault in ("kill_forward:1:2", "kill_checkpoint:0:4", "kill_backward:0:4", "kill_reduction:1:6",
                  "kill_optimizer:0:11"):
        ended = run_faulty(tiny_world, tmp_path, fault)
        killed = int(fault.split(":")[1])
        assert ended[killed].code == -signal.SIGKILL, f"{fault}\n{ended[killed].output[-3000:]}"
        assert "checkpoint" not in fault or (checkpoints / ".step-000004.tmp").is_dir()
    # Step 10 may still have been in writing, step 8 was not.
    newest = int((checkpoints / "latest").read_text().removeprefix("step-"))
    assert newest in (8, 10)
    weights = checkpoints / f"step-{newest:06d}/trainables.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    ended = run_faulty(tiny_world, tmp_path, "none:0:0")
    assert [one.code for one in ended] == [0, 0], ended[0].output[-3000:]
    assert f"{weights}: missing or damaged" in ended[0].output
    assert f"going back to {checkpoints}/step-{newest - 2:06d}" in ended[0].output
    assert_unbroken(tmp_path, unbroken)


def test_nan_on_one_rank_is_left_out_on_all_and_ends_the_run(tiny_world: tiny.Tiny, unbroken: Path,
                                                             tmp_path: Path) -> None:
    """NaN from the fifth step on: three steps are left out, on both ranks, and named."""
    ended = run_faulty(tiny_world, tmp_path, "nan:1:4", "train.max_skipped_in_a_row=3")
    for one in ended:
        assert one.code == 2 and one.first_error.startswith("error: step 7: the loss or the gradient was not finite in "
                                                            "3 steps in a row"), one.output[-3000:]
    named = [[json.loads(line) for line in (tmp_path / f"run/nonfinite-rank{rank}.jsonl").read_text().splitlines()]
             for rank in (0, 1)]
    assert [line["step"] for line in named[0]] == [line["step"] for line in named[1]] == [5, 6, 7]
    assert all(line["loss"] > 0 for line in named[0]) and all(line["loss"] != line["loss"] for line in named[1])
    assert [line["ids"] for line in named[1]] == [clips(tmp_path)[step, 1][0] for step in (4, 5, 6)]
    lines, expected = read_metrics(tmp_path / "run"), read_metrics(unbroken / "run")
    assert reported(lines[4]) == reported(expected[4]) and lines[5]["skipped_steps"] == 1
    kept = [(tmp_path / f"run/checkpoints/step-{step:06d}/trainables.safetensors").read_bytes() for step in (4, 6)]
    assert kept[0] == kept[1], "a step that was left out changed the weights"


SHORT = ("parallel.stuck_minutes=0.1", "parallel.timeout_minutes=0.4")


def test_a_stopped_rank_is_named(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    ranks = fault_worker.start(2, words(tiny_world, tmp_path, *SHORT), tmp_path, "stopped:1:3")
    try:
        ended = ranks[0].wait(LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
    stopped = rf"rank 1 \(process {ranks[1].pid} on \S+\) does not answer \(dead, stopped or cut off\)"
    assert re.search(rf"no progress for \d+ s after step 3: {stopped}; it was last at .*; rank 0 waits in .*:\d+ ",
                     ended.output), ended.output[-3000:]
    assert re.search(rf"lost contact after step 3: {stopped}", ended.output)
    assert ended.code == LOST_CONTACT and ended.first_error.startswith("error: a collective failed (")
    stacks = (tmp_path / "run/stacks-rank0.txt").read_text()
    assert "no progress for" in stacks and "in train_step" in stacks and "in forward" in stacks


def test_a_stuck_rank_is_named_and_a_second_signal_leaves_at_once(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """Rank 1 sleeps, rank 0 is deep in a collective: the first signal cannot be obeyed, the second is."""
    more = ("parallel.stuck_minutes=0.1", "parallel.timeout_minutes=4")
    ranks = fault_worker.start(2, words(tiny_world, tmp_path, *more), tmp_path, "stuck:1:3")
    try:
        # On a busy machine the first steps may be slow enough to be noticed too.
        wait_for(lambda: "after step 3: rank 1" in ranks[0].output, ranks[0].log)
        for pause in (0.5, GRACE + 2, 0):  # the second comes at once, as from a launcher, and doesn't count
            assert ranks[0].process.is_alive()
            os.kill(ranks[0].pid, signal.SIGTERM)
            time.sleep(pause)
        ended = ranks[0].wait(60)
    finally:
        for rank in ranks:
            rank.kill()
    assert re.search(r"no progress for \d+ s after step 3: rank 1 \(process \d+ on \S+\) holds the others up; it is at "
                     r"step\.py:\d+ train_step > fault_worker\.py:\d+ sleep_for_good after step 3; rank 0 waits in "
                     r"families\.py:\d+ run > ", ended.output), ended.output[-3000:]
    assert "sleep_for_good" in (tmp_path / "run/stacks-rank1.txt").read_text()
    assert ended.code == RESUMABLE and "SIGTERM: leaving at once" in ended.output
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-000002\n"


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8", errors="replace")[-3000:]
        time.sleep(0.05)


def test_a_signal_to_one_rank_saves_and_leaves_on_all(tiny_world: tiny.Tiny, unbroken: Path, tmp_path: Path) -> None:
    ranks = fault_worker.start(2, words(tiny_world, tmp_path, "train.save_every=100"), tmp_path, "slow:0:0")
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.is_file() and bool(metrics.read_text()), ranks[0].log)
        os.kill(ranks[1].pid, signal.SIGUSR1)
        ended = [rank.wait(LIMIT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [one.code for one in ended] == [RESUMABLE] * 2, ended[0].output[-3000:]
    assert "SIGUSR1: finishing this step" in ended[1].output and "the same command goes on" in ended[0].output
    saved = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step-"))
    assert max(read_metrics(tmp_path / "run")) == saved < STEPS
    ended = run_faulty(tiny_world, tmp_path, "none:0:0")
    assert ended[0].code == 0 and f"going on from {tmp_path}/run/checkpoints/step-{saved:06d}" in ended[0].output
    assert_unbroken(tmp_path, unbroken)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_signal_to_a_launcher_saves(tiny_world: tiny.Tiny, tmp_path: Path, launcher: str) -> None:
    """Launchers end with codes of their own, but pass the signal on and give the ranks time."""
    log = tmp_path / "log"
    process = launching.start([*launching.command(launcher, launching.TRAIN, 2),
                               *words(tiny_world, tmp_path, "train.save_every=1000", "train.max_steps=1000")], log)
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.is_file() and bool(metrics.read_text()), log)
        launching.interrupt(process, signal.SIGINT if launcher == "deepspeed" else signal.SIGTERM)
        ended = launching.wait(process, log, LIMIT)
    finally:
        launching.kill_tree(process)
    assert ended.code != 0 and "finishing this step" in ended.output, ended.output[-3000:]
    assert "leaving at once" not in ended.output.split("is saved; the same command")[0]
    saved = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step-"))
    assert saved == max(read_metrics(tmp_path / "run"))
