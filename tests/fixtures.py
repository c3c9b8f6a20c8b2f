"""Fixtures that several folders of tests share; each is built once a session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import assemble
from listen_dist.engine.checkpoint import TrainState
from listen_dist.engine.optim import build_optimizer
from tests import launching, tiny


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """Tiny models, shards and a configuration."""
    return tiny.build(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of the tiny configuration."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def trained(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Twelve unbroken steps on two ranks, started by the real `deepspeed` launcher."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [*launching.command("deepspeed", launching.TRAIN, 2), "--config", tiny_world.config_file,
             f"run_dir={folder}", "train.batches_per_step=2"]
    return TrainedRun(folder, launching.run(words, 600).check().output)


@pytest.fixture(scope="session")
def untrained(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, whose projector and pool are not those that a seed gives."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    write_untrained(tiny_world, folder)
    return folder


def write_untrained(world: tiny.Tiny, folder: Path) -> None:
    config = world.config("parallel.llm=replicated", f"run_dir={folder}")
    trainable = assemble(config, torch.device("cpu")).model.trainable
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainable.parameters():
            p.add_(0.3 * torch.randn_like(p))
    optimizer = build_optimizer(trainable, config.train)
    checkpoint.write(folder / "checkpoints", checkpoint.snapshot(config, TrainState(3), trainable, optimizer))


@pytest.fixture(scope="session")
def unbroken(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same twelve steps on two ranks, without a launcher, with the clips of each step noted."""
    from tests.distributed import fault_worker  # imports DeepSpeed, which most tests don't need

    folder = tmp_path_factory.mktemp("unbroken")
    for rank in fault_worker.start(2, fault_worker.words(tiny_world.config_file, folder), folder):
        rank.wait(600).check()
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, so that sums are added in the same order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
