"""The batch scripts on a real Slurm: two nodes, signalled and requeued in mid-run, and a job that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from listen_dist.data.shards import ShardIndex
from tests import launching, slurm_cluster, tiny
from tests.distributed.test_resume import STEPS, read_metrics, reported
from tests.slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(2400)

SCRIPT = "slurm/train_multitask.sh"
LIMIT = 900.0
"""Seconds for a job, on a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    started = Cluster()
    yield started
    started.stop()


def until(cluster: Cluster, job: str, log: Path, condition: Callable[[], bool]) -> None:
    """Wait; a job that Slurm requeued is let go on at once instead of after its two minutes."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if "BeginTime" in cluster.call("squeue", "-h", "-j", job, "-o", "%r"):
            cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        ranks = "\n".join(path.read_text()[-1500:] for path in log.parent.rglob("rank-*.log"))
        script = log.read_text(encoding="utf-8") if log.exists() else ""
        assert time.monotonic() < deadline, f"{script}\n{ranks}\n{cluster.logs()}"
        time.sleep(0.2)


def over(cluster: Cluster, job: str) -> Callable[[], bool]:
    return lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "")


SLOW = """#!/bin/sh
exec {python} -c '
import sys, time
from listen_dist import train
from tests.distributed import fault_worker
fault_worker.before(fault_worker.Listen, "forward", lambda *_, **__: time.sleep(0.4))
sys.exit(train.main(sys.argv[3:]))
' "$@"
"""
"""A Python in which the trainer takes longer for each step: there is time for a signal in mid-run."""


def test_signalled_and_requeued_the_run_is_the_unbroken_one(cluster: Cluster, tiny_world: tiny.Tiny,
                                                            unbroken: Path, tmp_path: Path) -> None:
    """The signal before the time limit first, then `scontrol requeue`, as a preemption does."""
    log, run = tmp_path / "job.log", tmp_path / "run"
    slow = tmp_path / "python"
    slow.write_text(SLOW.format(python=launching.BIN / "python"))
    slow.chmod(0o755)
    job = cluster.submit(log, SCRIPT, tiny_world.config_file, f"run_dir={run}", "train.batches_per_step=2",
                         "train.save_every=1000", "parallel.health_check=true", python=slow)

    def reached(step: int) -> Callable[[], bool]:
        return lambda: (run / "metrics.jsonl").is_file() and max(read_metrics(run), default=0) >= step

    until(cluster, job, log, reached(2))
    cluster.call("scancel", "--signal=USR1", job)  # what --signal does: to the job's steps, not to the script
    until(cluster, job, log, lambda: "requeued (restart 1)" in log.read_text())
    first = max(read_metrics(run))
    until(cluster, job, log, reached(first + 1))
    cluster.call("scontrol", "requeue", job)
    until(cluster, job, log, over(cluster, job))
    rank = (tmp_path / "ranks" / job / "rank-0.log").read_text()
    assert cluster.state(job) == "COMPLETED", log.read_text() + rank[-3000:]
    assert "SIGUSR1: finishing this step" in rank and "SIGTERM: finishing this step" in rank
    began = [int(step) for step in re.findall(r"going on from \S+/step-(\d+)", rank)]
    assert len(began) == 2 and began[0] == first < began[1] < STEPS, began
    assert log.read_text().splitlines()[-1] == f"finished; logs of the ranks: {tmp_path / 'ranks' / job}"
    ours, theirs = read_metrics(run), read_metrics(unbroken / "run")
    assert sorted(ours) == sorted(theirs)
    for step, line in theirs.items():
        assert reported(ours[step]) == reported(line), f"step {step}"
    other = (tmp_path / "ranks" / job / "rank-1.log").read_text()
    assert "rank 1 of 2 holds" in rank and other.count("finishing this step") == 2
    assert re.search(r"health: 1 pairs of nodes exchange at a median of \d+\.\d\d GB/s", rank)


def test_a_failing_job_says_why_in_its_first_line(cluster: Cluster, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(log, SCRIPT, tiny_world.config_file, f"run_dir={tmp_path / 'run'}", "train.max_stepz=3")
    until(cluster, job, log, over(cluster, job))
    lines = log.read_text().splitlines()
    assert lines[0] == ("error: command line: unknown key 'train.max_stepz'; the nearest known one is "
                        "'train.max_steps'"), log.read_text()
    assert "failed with code 2" in log.read_text() and cluster.state(job) == "FAILED"


FAULTY = """#!/bin/sh
exec {python} -c '
import os, sys
from listen_dist import train
from tests.distributed import fault_worker
def fail(*_, **__):
    if os.environ["RANK"] == "1":
        raise KeyError("this clip cannot be computed")
fault_worker.before(fault_worker.Listen, "forward", fail)
sys.exit(train.main(sys.argv[3:]))
' "$@"
"""


def test_a_fault_of_one_rank_is_not_tried_again(cluster: Cluster, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """The other rank ends with the higher code 76, as if it alone mattered."""
    log, python = tmp_path / "job.log", tmp_path / "python"
    python.write_text(FAULTY.format(python=launching.BIN / "python"))
    python.chmod(0o755)
    job = cluster.submit(log, SCRIPT, tiny_world.config_file, f"run_dir={tmp_path / 'run'}", python=python)
    until(cluster, job, log, lambda: log.exists() and "failed with code" in log.read_text())
    assert log.read_text().splitlines()[0] == "error: KeyError: 'this clip cannot be computed'", log.read_text()
    assert "failed with code 76" in log.read_text() and "requeued" not in log.read_text()
    until(cluster, job, log, over(cluster, job))
    assert cluster.state(job) == "FAILED"


PRINTER = """#!/bin/sh
echo $RANK of $WORLD_SIZE, local $LOCAL_RANK, sees $CUDA_VISIBLE_DEVICES, $SLURM_CPUS_PER_TASK cpus, \\
  $OMP_NUM_THREADS threads
"""


@pytest.mark.parametrize(("shape", "ranks"), [
    (["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"],
     [f"{rank} of 4, local {rank % 2}, sees 0,1, 1 cpus, 1 threads" for rank in range(4)]),
    (["--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=2"],
     [f"{rank} of 2, local 0, sees 0, 2 cpus, 2 threads" for rank in range(2)]),
    (["--nodes=1", "--gpus-per-task=1", "--ntasks-per-node=2"],  # a GPU bound to each task
     [f"{rank} of 2, local 0, sees {rank}, 1 cpus, 1 threads" for rank in range(2)]),
    (["--nodes=2", "--gpus-per-node=2", "--exclusive"],  # whole nodes: their CPUs are shared out
     [f"{rank} of 4, local {rank % 2}, sees 0,1, 1 cpus, 1 threads" for rank in range(4)]),
])
def test_a_rank_for_each_gpu(cluster: Cluster, tmp_path: Path, shape: list[str], ranks: list[str]) -> None:
    log, python = tmp_path / "job.log", tmp_path / "python"
    python.write_text(PRINTER)
    python.chmod(0o755)
    job = cluster.submit(log, SCRIPT, python=python, shape=shape)
    until(cluster, job, log, over(cluster, job))
    assert cluster.state(job) == "COMPLETED", log.read_text()
    said = [(tmp_path / f"ranks/{job}/rank-{rank}.log").read_text().strip() for rank in range(len(ranks))]
    assert said == ranks


def test_too_few_cpus_are_said(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(log, SCRIPT, shape=["--nodes=2", "--gpus-per-node=2"])
    until(cluster, job, log, over(cluster, job))
    assert log.read_text() == ("error: 2 ranks a node and only 1 of its CPUs: add --ntasks-per-node=2 "
                               "--cpus-per-task=8 to sbatch\n")
    assert cluster.state(job) == "FAILED"


def test_evaluate(cluster: Cluster, tiny_world: tiny.Tiny, unbroken: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(log, "slurm/evaluate.sh", unbroken / "run/config.yaml", "--out", tmp_path / "out")
    until(cluster, job, log, over(cluster, job))
    assert cluster.state(job) == "COMPLETED", log.read_text()
    results: dict[str, Any] = json.loads((tmp_path / "out/results.json").read_text())
    assert results["ranks"] == 2
    assert sum(task["samples"] for task in results["tasks"].values()) == sum(
        entry.samples for entry in ShardIndex.load(tiny_world.test).shards)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    scripts = sorted(str(path) for path in (launching.ROOT / "slurm").glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=launching.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_repeat_nothing_of_the_config() -> None:
    """No GPU count, port, host name or config key stands in them."""
    for path in (launching.ROOT / "slurm").glob("*.sh"):
        text = re.sub(r"^#.*", "", path.read_text(), flags=re.M)
        assert not re.search(r"\b(train|data|model|pool|parallel)\.(?!py)|run_dir|29500|localhost|--gpus", text), path
    assert os.access(launching.ROOT / SCRIPT, os.X_OK)
