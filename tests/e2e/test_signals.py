"""Signals to the whole process group, as from a terminal, Slurm or a container: the code is 75 at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from listen_dist.exits import RESUMABLE
from tests import launching, tiny

pytestmark = pytest.mark.timeout(600)

LIMIT = 240.0
"""Seconds for one launch, on a busy machine."""


def handles_sigterm(process: subprocess.Popen[bytes]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def starts_a_worker(process: subprocess.Popen[bytes]) -> bool:
    try:
        return any("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children())
    except psutil.Error:  # gone, or not yet there
        return False


def ended_by(number: signal.Signals, pause: float, moment: Callable[[subprocess.Popen[bytes]], bool],
             words: list[str], log: Path) -> launching.Finished:
    """Train; at the moment, and after a pause, the whole group gets the signal."""
    process = launching.start([*launching.command("python", launching.TRAIN), *words], log)
    try:
        deadline = time.monotonic() + LIMIT
        while not moment(process):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.002)
        time.sleep(pause)
        os.killpg(process.pid, number)
        return launching.wait(process, log, LIMIT)
    finally:
        launching.kill_tree(process)


def test_a_signal_to_the_group_at_any_moment_is_resumable(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """From the first import on, while a loader process starts, at random in between, and in the loop."""
    def steps(process: subprocess.Popen[bytes]) -> bool:
        return (tmp_path / "run-3/metrics.jsonl").is_file() and bool((tmp_path / "run-3/metrics.jsonl").read_bytes())

    cases = [(signal.SIGTERM, 0.0, handles_sigterm), (signal.SIGHUP, random.uniform(0, 8), handles_sigterm),
             (signal.SIGTERM, random.uniform(0, 0.2), starts_a_worker), (signal.SIGUSR2, 0.0, steps)]

    def run(number: int) -> launching.Finished:
        words = ["--config", str(tiny_world.config_file), f"run_dir={tmp_path}/run-{number}", "data.workers=2",
                 "train.max_steps=100000", "train.save_every=100000", "train.log_every=1"]
        return ended_by(*cases[number], words, tmp_path / f"log-{number}")

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, range(len(cases))))
    for (number, pause, moment), one in zip(cases, ended, strict=True):
        assert one.code == RESUMABLE, f"{number.name} {pause:.3f} s after {moment.__name__}\n{one.output[-3000:]}"
        assert "Traceback" not in one.output and not one.first_error, one.output[-3000:]
    assert "SIGUSR2: finishing this step" in ended[3].output and "which is saved" in ended[3].output


def test_what_the_surroundings_ignore_stays_ignored() -> None:
    """`nohup`: a closed terminal ends nothing."""
    code = ("import os, signal, sys; from listen_dist.engine import signals\n"
            "signal.signal(signal.SIGHUP, signal.SIG_IGN); signals.leave_when_asked()\n"
            "with signals.StopRequest() as stop:\n"
            "    stop.can_wait = True\n"
            "    os.kill(os.getpid(), signal.SIGHUP)\n"
            "    assert not stop.asked\n")
    assert launching.run([launching.BIN / "python", "-c", code], 60).code == 0
