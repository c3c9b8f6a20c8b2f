"""Memory per rank, from a config alone: will it fit?"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from listen_dist.config import Config

MIB = 2**20


@dataclass(frozen=True)
class LLMSize:
    """What planning needs to know of an LLM."""

    parameters: int
    largest_module: int
    """Parameters of its largest single layer (embedding or matrix), gathered in one piece."""
    width: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    llm_held: int
    """Shards of the frozen LLM (all of it where it is replicated)."""
    llm_gathered: int
    """Most weights gathered at once while it computes."""
    encoder: int
    trainables: int
    """fp32 parameters, gradients and AdamW's two moments."""
    activations: int
    """Kept from forward to backward for one micro-batch, plus the logits."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def lines(self) -> list[str]:
        """One line an item, in MiB, for the start-up summary."""
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)] + [("total", self.total)]
        return [f"  planned {name:<13} {size / MIB:10.1f} MiB" for name, size in rows]


def llm_size(path: str) -> LLMSize:
    """Count an LLM's parameters on the meta device: its weights are not read."""
    config: PretrainedConfig = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    return LLMSize(count(llm), max(p.numel() for p in llm.parameters()), config.hidden_size,
                   config.num_hidden_layers, config.vocab_size)


def room_for_whole(config: Config, size: LLMSize) -> int:
    """Bytes that decoding needs on one rank beyond its shard when the LLM is gathered whole.

    The weights, keys and values of a batch while it decodes (as if grouped queries saved nothing, and once
    more for what Hugging Face copies when they grow), and one step's logits.
    """
    item = 2 if config.model.dtype == "bfloat16" else 4
    tokens = config.eval.batch_tokens * config.eval.beams
    cache = 2 * tokens * size.layers * 2 * size.width * item
    logits = tokens * size.vocabulary // 8 * 4  # a row has eight tokens or more
    return size.parameters * item + cache + logits


def count(module: nn.Module) -> int:
    """Parameters of a module (whole ones; not for a sharded LLM)."""
    return sum(p.numel() for p in module.parameters())


def plan_memory(config: Config, size: LLMSize, ranks: int, encoder_parameters: int,
                trainable_parameters: int) -> MemoryPlan:
    """Estimate one rank's memory.

    Activations of a frozen Llama-like layer kept for the backward pass: about 24 vectors
    of the LLM's width a token (norms, q, k, v, attention output, gate, up and their product),
    in the LLM's dtype. Logits: the target tokens, at most a quarter of the budget, three
    times in fp32 (logits, their softmax, its gradient).
    """
    item = 2 if config.model.dtype == "bfloat16" else 4
    sharded = config.parallel.llm == "full"
    gathered = min(size.parameters, config.parallel.max_live_parameters + size.largest_module)
    tokens = config.data.batch_tokens
    return MemoryPlan(
        llm_held=size.parameters * item // (ranks if sharded else 1),
        llm_gathered=gathered * item if sharded and ranks > 1 else 0,
        encoder=encoder_parameters * item,
        trainables=16 * trainable_parameters,
        activations=tokens * size.layers * 24 * size.width * item + tokens // 4 * size.vocabulary * 12,
    )
