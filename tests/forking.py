"""Real ranks, forked from one server process that has imported everything.

A new Python takes 8 s of a core for torch, transformers and DeepSpeed. What a program's launch, its memory or its
environment does is tested with `launching`, which starts programs as a user does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests import launching

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["deepspeed.runtime.zero", "listen_dist.train", "listen_dist.evaluate", "tests.tiny"])


@dataclass(frozen=True)
class Rank:
    """One process and its output."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace", encoding="utf-8") if self.log.exists() else ""

    def kill(self) -> None:
        """End it and its loaders, at once and without a chance to clean up."""
        try:
            loaders = psutil.Process(self.pid).children(recursive=True) if self.process.exitcode is None else []
        except psutil.NoSuchProcess:
            loaders = []
        self.process.kill()
        for loader in loaders:
            try:
                loader.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.join(60)

    def wait(self, seconds: float) -> launching.Finished:
        """Its end; past the limit it is killed and the test fails with its output."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"no end within {seconds:.0f} s:\n{self.output[-6000:]}")
        return launching.Finished(self.process.exitcode, self.output)


_SERVER = threading.Lock()
"""Two threads that set the environment aside at a time would not put all of it back."""


def start(world: int, target: Callable[..., None], arguments: Sequence[Any], folder: Path) -> list[Rank]:
    """Call `target(*arguments)` on `world` ranks that can meet over a port or over the file STORE; logs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _SERVER, mock.patch.dict(os.environ, launching.environment(), clear=True):
        forkserver.ensure_running()
    port, started = launching.free_port(), []
    for number in range(world):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "STORE": folder / f"store-{port}"}
        variables = launching.environment() | {key: str(value) for key, value in place.items()}
        log = folder / f"rank-{number}.log"
        process = CONTEXT.Process(target=_be_rank, args=(variables, log, target, arguments))
        process.start()
        started.append(Rank(process, log))
    return started


def run(world: int, module: str, words: Sequence[object], folder: Path, seconds: float = 600) -> list[str]:
    """`python -m module` on `world` ranks to its end, which must be a good one; outputs by rank."""
    started = start(world, be_program, (module, list(map(str, words))), folder)
    try:
        return [rank.wait(seconds).check().output for rank in started]
    finally:
        for rank in started:
            rank.kill()


def _be_rank(variables: dict[str, str], log: Path, target: Callable[..., None], arguments: Sequence[Any]) -> None:
    import torch

    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(launching.ROOT)
    torch.set_num_threads(1)
    target(*arguments)


def be_program(module: str, words: list[str]) -> None:
    """As `python -m module` would."""
    sys.argv = [module, *words]
    sys.exit(importlib.import_module(module).main())
