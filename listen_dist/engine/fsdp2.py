"""PyTorch's FSDP2 for a frozen LLM; the only module that knows its idioms.

Each layer, the embedding and the head are one unit: gathered for their own forward and backward, released
after each. Frozen weights get no gradient, so nothing is ever reduced, and copies of the LLM on
other nodes need no mesh dimension of their own: each copy is sharded over its own group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from listen_dist import dist
from listen_dist.models.families import embedding_of
from listen_dist.models.llm import pieces


class Fsdp2:
    """Every weight of the LLM cut along its first dimension over the ranks of a group.

    Args:
        dtype: of the shards.
        group: the ranks that share one copy of the LLM; None: all.
    """

    def __init__(self, dtype: torch.dtype, group: ProcessGroup | None) -> None:
        self._dtype = dtype
        self._group = group

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        """Read one piece after another and keep this rank's part of each."""
        llm = build()
        mesh = (init_device_mesh(device.type, (dist.world_size(),)) if self._group is None
                else DeviceMesh.from_group(self._group, device.type))
        embedding, head = embedding_of(llm), llm.get_output_embeddings()
        tied = head.weight is embedding.weight
        if tied:
            del head.weight
            head.weight = torch.empty(0, dtype=self._dtype)  # some (Mamba) ask for its type
        for piece in pieces(llm, self._dtype, device):
            fully_shard(piece, mesh=mesh, reshard_after_forward=True)
        if tied:
            _project_with(cast(nn.Embedding, embedding), head)
        self._llm = llm
        # The first call decides which unit is the root, and training calls the embedding before the LLM.
        with torch.no_grad():
            llm(inputs_embeds=torch.zeros(1, 1, embedding.embedding_dim, dtype=self._dtype, device=device))
        return llm

    def _units(self) -> list[FSDPModule]:
        return [module for module in self._llm.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights and keep them; release them whatever happens inside."""
        root = cast(FSDPModule, self._llm)
        root.set_reshard_after_forward(False)
        try:
            for unit in self._units():
                unit.unshard()
            yield
        finally:
            root.set_reshard_after_forward(True)
            for unit in self._units():
                unit.reshard()

    def bytes_held(self) -> int:
        """Bytes of the shards on this rank."""
        shards = [cast(DTensor, p).to_local() for p in self._llm.parameters() if not p.requires_grad]
        return sum(shard.numel() * shard.element_size() for shard in shards)


def _project_with(embedding: nn.Embedding, head: nn.Linear) -> None:
    """Compute the head of tied weights as a second forward of the embedding's unit.

    A unit owns its weights, so that two units would hold the same ones twice.
    """
    def project(hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, embedding.weight, head.bias)

    embedding.project = project  # type: ignore[assignment]
    register_fsdp_forward_method(embedding, "project")
    head.forward = embedding.project  # type: ignore[assignment, method-assign]
