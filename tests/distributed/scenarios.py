"""The layouts, numbers of ranks and batches that real ranks go through, and how to read what they wrote down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

LAYOUTS = {
    "full": "parallel.llm=full", "node": "parallel.llm=node", "replicated": "parallel.llm=replicated",
    "fsdp2 full": "parallel.llm=full,parallel.backend=fsdp2", "fsdp2 node": "parallel.llm=node,parallel.backend=fsdp2",
}
NODE_SIZE = {1: 1, 2: 1, 4: 2}
"""Ranks of a "node", by number of ranks."""
MICRO_BATCHES = {1: {"full": (1, 2, 3, 4, 6)}, 2: {"full": (1, 2, 3, 4), "replicated": (3, 4)}, 4: {}}
"""Micro-batches of a step that are tried, by ranks and layout; else 6 for four ranks and 3 for fewer. So ranks
accumulate, and some have nothing left in the last round. In bfloat16: these last ones alone."""

TASK_WEIGHTS = {"caption": 2.5}


@dataclass(frozen=True)
class Ranks:
    """What the ranks of one scenario wrote down."""

    folder: Path
    layout: str
    world: int
    micro_batches: int
    dtype: str = "float32"
    query: str = "raw"

    def __str__(self) -> str:
        centred = ", centred" * (self.query == "centred")
        return f"{self.layout}, {self.world} ranks, {self.micro_batches} micro-batches, {self.dtype}{centred}"

    @property
    def words(self) -> str:
        """What the worker is told."""
        weights = ",".join(f"train.task_weights.{task}={weight}" for task, weight in TASK_WEIGHTS.items())
        return (f"{self.folder.name}:train.clip_norm=0,train.batches_per_step={self.micro_batches},{weights},"
                f"model.dtype={self.dtype},pool.query={self.query},parallel.node_size={NODE_SIZE[self.world]},{LAYOUTS[self.layout]}")

    @property
    def copies(self) -> int:
        """Copies of the LLM over all ranks."""
        if self.layout.endswith("full"):
            return 1
        return self.world // (1 if self.layout == "replicated" else NODE_SIZE[self.world])

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"notes-{rank}.json").read_text()) for rank in range(self.world)]

    def tensors(self, kind: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{kind}-{rank}.safetensors") for rank in range(self.world)]

    def weights(self, when: str) -> dict[str, Tensor]:
        """Learned parameters and the statistics beside them, "before" or "after" the steps, of rank 0."""
        return self.tensors(when)[0] | self.tensors(f"statistics-{when}")[0]

    def loss(self, step: int) -> float:
        """Mean over all target tokens of a step's global batch."""
        steps = [notes["steps"][step] for notes in self.notes()]
        return sum(one["loss"] for one in steps) / sum(one["tokens"] for one in steps)

    def ids(self, step: int) -> list[str]:
        """All clips of a step's global batch, in the order of the plan."""
        rounds = zip(*(notes["steps"][step]["ids"] for notes in self.notes()), strict=True)
        return [name for one_round in rounds for batch in one_round for name in batch]


def scenarios(folder: Path) -> list[Ranks]:
    found = []
    for world, table in MICRO_BATCHES.items():
        usual = 6 if world == 4 else 3
        for layout in LAYOUTS:
            found += [Ranks(folder / f"{world}-{layout}-{n}", layout, world, n) for n in table.get(layout, (usual,))]
            found.append(Ranks(folder / f"{world}-{layout}-{usual}-bfloat16", layout, world, usual, "bfloat16"))
    found.append(Ranks(folder / "1-full-6-bfloat16", "full", 1, 6, "bfloat16"))
    found += [Ranks(folder / f"{world}-{layout}-3-centred", layout, world, 3, query="centred")
              for world, layout in ((1, "full"), (2, "full"), (2, "fsdp2 full"))]
    return found


EXACT = {i: str(one) for i, one in enumerate(scenarios(Path())) if one.dtype == "float32"}
each = pytest.mark.parametrize("case", EXACT, ids=EXACT.values())
"""Runs a test once for each scenario in float32; it finds what the ranks wrote in `ranks[case]`."""


def alone(found: list[Ranks], one: Ranks) -> Ranks:
    """One rank on the same global batches, in the same dtype and with the same kind of query."""
    return next(other for other in found if (other.world, other.layout) == (1, "full")
                and (other.micro_batches, other.dtype, other.query) == (one.micro_batches, one.dtype, one.query))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Size of the difference, relative to `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())
