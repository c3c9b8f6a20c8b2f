"""Real ranks of the trainer, with a planted fault.

Nothing of the trainer is replaced: its functions are wrapped, and what is not faulty runs as it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from listen_dist import dist, train
from listen_dist.engine import checkpoint, replicated, step
from listen_dist.models.listen import Listen
from tests import forking


def words(config_file: Path, folder: Path, *more: str) -> list[object]:
    """The trainer's command line for a run in `folder`/run that saves every second step."""
    return ["--config", config_file, f"run_dir={folder / 'run'}", "train.batches_per_step=2", "train.save_every=2",
            *more]


def start(world: int, words: Sequence[object], folder: Path, fault: str = "none:0:0") -> list[forking.Rank]:
    """Start the trainer on `world` ranks. Logs and notes of the clips taken go to `folder`.

    Args:
        fault: kind:rank:step (from 0); several kinds with + between.
    """
    return forking.start(world, run_rank, (list(map(str, words)), fault, folder), folder)


def run_rank(words: list[str], fault: str, folder: Path) -> None:
    """What a forked process does."""
    Here.kind, rank, planned = fault.split(":")
    Here.faulty, Here.planned, Here.folder = rank == os.environ["RANK"], int(planned), folder
    before(train, "train_step", note_step)
    for kind in Here.kind.split("+"):
        if kind in PLANTED:
            before(*PLANTED[kind])
    if "clock" in Here.kind:
        turn_the_clock()
    sys.exit(train.main(words))


class Here:
    """This rank: what is wrong with it and which step it is at."""

    kind = "none"
    faulty = False
    planned = 0
    now = -1
    folder = Path()


def due() -> bool:
    return Here.faulty and Here.now == Here.planned


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Do `action` before every call of `owner.name`, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def note_step(*args: Any, **_: Any) -> None:
    Here.now = args[4]
    with (Here.folder / f"clips-{dist.rank()}").open("a") as file:
        file.write(json.dumps([args[4], [batch.ids for batch in args[6]]]) + "\n")


def fall(*_: Any, **__: Any) -> None:
    if due():
        die()


def fall_in_backward(*args: Any, **_: Any) -> None:
    """From within the graph, when the gradient reaches the pool."""
    if due():
        args[0].pool.values.register_hook(lambda _: die())


def fall_in_reduction(*args: Any, **_: Any) -> None:
    """While the collective runs: a little after its call."""
    if due() and args[0].numel() > 1000:
        threading.Timer(0.001, die).start()


def fall_in_checkpoint(path: Any, *_: Any) -> None:
    if Here.faulty and path.name == "optimizer.safetensors" and f"{Here.planned:06d}" in path.parent.name:
        path.write_bytes(b"half of it")
        die()


def plant_nan(model: Listen, batch: Any, *_: Any) -> None:
    if Here.faulty and Here.now >= Here.planned:
        batch.audio.fill_(torch.nan)


def stop_for_good(*_: Any, **__: Any) -> None:
    if due():
        os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_good(*_: Any, **__: Any) -> None:
    if due():
        time.sleep(1000)


def be_slow(*_: Any, **__: Any) -> None:
    if Here.faulty:
        time.sleep(0.2)


def turn_the_clock() -> None:
    """The wall clock jumps back and forth by hours with every reading."""
    true, readings = time.time, iter(range(10**9))
    time.time = lambda: true() + (-1) ** next(readings) * 50_000


PLANTED: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "kill_forward": (Listen, "forward", fall),
    "kill_backward": (Listen, "forward", fall_in_backward),
    "kill_reduction": (replicated.dist, "sum_", fall_in_reduction),
    "kill_optimizer": (torch.optim.AdamW, "step", fall),
    "kill_checkpoint": (checkpoint, "_write_synced", fall_in_checkpoint),
    "nan": (Listen, "forward", plant_nan),
    "stopped": (Listen, "forward", stop_for_good),
    "stuck": (step, "set_learning_rate", sleep_for_good),
    "slow": (Listen, "forward", be_slow),
}
