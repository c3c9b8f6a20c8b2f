"""DeepSpeed ZeRO-3 for a frozen LLM; the only module that knows DeepSpeed.

The LLM alone is put in an engine without an optimizer. The trainables stay outside, so
they are ordinary fp32 parameters. What is called is the engine's module, and backward is
plain `loss.backward()`: ZeRO's hooks on the submodules gather and release the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig


class Zero3:
    """Every weight of the LLM in equal parts over all ranks.

    Args:
        dtype: "bfloat16" or "float32", the type of the shards.
        max_live_parameters: gathered parameters kept at once beside the layer at work.
    """

    def __init__(self, dtype: str, max_live_parameters: int) -> None:
        self._config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == "bfloat16"},  # must stand here while loading, or shards are fp32
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 10_000,
                "stage3_max_live_parameters": max_live_parameters,
                "stage3_max_reuse_distance": max_live_parameters,
                "stage3_prefetch_bucket_size": min(max_live_parameters, 50_000_000),
            },
        }

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        """Load straight into shards: no rank ever holds the whole model."""
        import deepspeed
        import deepspeed.ops

        if device.type == "cpu":
            # Else a C++ communication op is compiled at the first launch (25 s, needs ninja and g++).
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        # Alive only while the LLM loads: whatever transformers builds meanwhile is sharded too.
        loading = HfDeepSpeedConfig(self._config)
        llm = build()
        del loading
        # DeepSpeed leaves a bound method behind here, which hides typing.Generic's own: any later class that is
        # both (aac_metrics has some) would fail to be defined. torch.nn.Module has none of its own.
        if "__init_subclass__" in vars(torch.nn.Module):
            del torch.nn.Module.__init_subclass__
        self._engine = deepspeed.initialize(model=llm, config=self._config)[0]
        return self._engine.module

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights and take ZeRO's hooks off; put both back whatever happens inside."""
        from deepspeed.runtime.zero import unwrap_model_for_generation

        manager = unwrap_model_for_generation(self._engine)
        manager.__enter__()
        try:
            yield
        finally:
            # DeepSpeed restores its hooks only on a normal exit, so an exception is not shown to it.
            manager.__exit__(None, None, None)

    def bytes_held(self) -> int:
        """Bytes of the shards on this rank (weights gathered now, and small ones kept so, come on top)."""
        return sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self._engine.module.parameters()
                   if not p.requires_grad)  # LoRA's are whole everywhere and belong to the learned part

