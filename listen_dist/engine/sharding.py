"""How the frozen LLM lies on the ranks, behind one small interface.

`full`        ZeRO-3: each rank holds 1/ranks of every weight and gathers a layer to use it.
`replicated`  each rank holds the whole LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from transformers import PreTrainedModel

from listen_dist.config import Config
from listen_dist.engine.zero3 import Zero3


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
    """The whole LLM on every rank."""

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        self._llm = build()
        self._llm.to(device)  # type: ignore[arg-type]
        return self._llm

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bytes_held(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._llm.parameters() if not p.requires_grad)


def sharding_for(config: Config) -> Sharding:
    """The layout that `parallel.llm` names."""
    if config.parallel.llm == "replicated":
        return Replicated()
    return Zero3(config.model.dtype, config.parallel.max_live_parameters)
