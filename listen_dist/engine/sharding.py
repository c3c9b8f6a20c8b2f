"""How the frozen LLM lies on the ranks, behind one small interface.

`full`        each rank holds 1/ranks of every weight and gathers a layer to use it.
`node`        the same among the ranks of each node, so that no weight crosses the network.
`replicated`  each rank holds the whole LLM.

`full` and `node` come from DeepSpeed (ZeRO-3) or from PyTorch (FSDP2); results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from transformers import PreTrainedModel

from listen_dist import dist
from listen_dist.engine.fsdp2 import Fsdp2
from listen_dist.engine.zero3 import Zero3
from listen_dist.models.llm import DTYPES, pieces
from listen_dist.schema import Config


class Sharding(Protocol):
    """One layout of the frozen LLM."""

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        """Build the LLM and lay it out; call the result like any Hugging Face model."""

    def whole(self) -> AbstractContextManager[None]:
        """While it is open, weights are whole on every rank and forward needs no other rank.

        For generation, where ranks run different numbers of steps. No training inside.
        """

    def bytes_held(self) -> int:
        """Bytes of LLM weights that this rank keeps between steps."""


class Replicated:
    """The whole LLM on every rank.

    On a CPU, weights that are stored in `dtype` stay views of the mapped file, which ranks share.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        self._llm = build()
        for _ in pieces(self._llm, self._dtype, device):
            pass
        self._llm.to(device)  # type: ignore[arg-type]
        return self._llm

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bytes_held(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._llm.parameters() if not p.requires_grad)


def sharding_for(config: Config) -> Sharding:
    """The layout that `parallel.llm` names."""
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    if parallel.llm == "replicated":
        return Replicated(dtype)
    in_nodes = parallel.llm == "node" and dist.world_size() > 1
    group = dist.node_group(parallel.node_size, parallel.timeout_minutes) if in_nodes else None
    if parallel.backend == "fsdp2":
        return Fsdp2(dtype, group)
    return Zero3(dtype, parallel.max_live_parameters, group)
