"""Start real programs and real ranks from tests; whatever hangs is killed with all its children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TRAIN, EVALUATE = "listen_dist/train.py", "listen_dist/evaluate.py"


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    code: int
    output: str
    """stdout and stderr together."""

    def check(self) -> Finished:
        assert self.code == 0, self.output[-6000:]
        return self

    @property
    def first_error(self) -> str:
        """The first line that begins with `error:`, empty where there is none."""
        return next((line for line in self.output.splitlines() if line.startswith("error:")), "")


def environment() -> dict[str, str]:
    """This environment on the CPU, one thread a rank, without a hub, and without marks of another launch."""
    marks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    kept = {key: value for key, value in os.environ.items() if key not in marks}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(launcher: str, script: str, ranks: int = 1) -> list[str]:
    """The words that start a script under `deepspeed`, `torchrun` or plain `python`."""
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), script]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(free_port()), script]
    return [sys.executable, script]


def start(words: Sequence[str | Path], log: Path, extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen([str(word) for word in words], cwd=ROOT, env=environment() | (extra or {}),
                                stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a program and everything it started, at once and without a chance to clean up."""
    if process.poll() is not None:  # its number may be another program's by now
        return
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    process.wait(60)  # a loaded machine takes its time to take memory back


def interrupt(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a launcher; Ctrl-C goes to all processes of its terminal, as from a keyboard."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def wait(process: subprocess.Popen[bytes], log: Path, seconds: float) -> Finished:
    """Wait for the end; past the limit everything is killed and the test fails with the output."""
    try:
        return Finished(process.wait(seconds), log.read_text(encoding="utf-8", errors="replace"))
    except subprocess.TimeoutExpired:
        kill_tree(process)
        said = log.read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"no end within {seconds:.0f} s:\n{said[-6000:]}") from None


def run(words: Sequence[str | Path], seconds: float = 400, extra: dict[str, str] | None = None) -> Finished:
    """Run a program to its end, with these `extra` variables in its environment."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return wait(start(words, log, extra), log, seconds)


def run_ranks(world: int, module: str, words: Sequence[str | Path], folder: Path, seconds: float = 600) -> list[str]:
    """Run `python -m module` on `world` ranks; they meet over a file store (variable STORE). Outputs by rank."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    started = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "STORE": str(store)}
        log = folder / f"{module.rpartition('.')[2]}-{rank}-of-{world}.log"
        started.append((start([sys.executable, "-m", module, *words], log, ranks), log))
    try:
        return [wait(process, log, seconds).check().output for process, log in started]
    finally:
        for process, _ in started:
            kill_tree(process)
