"""What the cases of several kinds share: tiny models, a Listener, all built once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from listen_dist.inference.listener import Listener
from tests import tiny
from tests.fixtures import write_untrained
from tests.launching import ROOT

__all__ = ["ROOT", "World", "build", "one_thread"]


@dataclass(frozen=True)
class World:
    """Tiny models and shards, and a run with a checkpoint."""

    tiny: tiny.Tiny
    run: Path

    @cached_property
    def listener(self) -> Listener:
        return Listener.from_checkpoint(self.run, device="cpu")


_built: dict[Path, World] = {}


def use(root: Path, world: World) -> None:
    """Take a world that is there already for that of `root`."""
    _built[root] = world


def build(root: Path) -> World:
    """The world in `root`; built by the first who asks, in this process or another."""
    if root not in _built:
        world = tiny.Tiny(root / "tiny")
        if not (root / "ready").exists():
            world = tiny.build(root / "tiny")
            write_untrained(world, root / "run")
            (root / "ready").touch()
        _built[root] = World(world, root / "run")
    return _built[root]


def one_thread() -> None:
    torch.set_num_threads(1)
