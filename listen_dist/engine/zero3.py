"""DeepSpeed ZeRO-3 for a frozen LLM; the only module that knows DeepSpeed.

The LLM alone is put in an engine without an optimizer. The trainables stay outside, so
they are ordinary fp32 parameters. What is called is the engine's module, and backward is
plain `loss.backward()`: ZeRO's hooks on the submodules gather and release the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from listen_dist.models.families import expert_blocks
from listen_dist.models.llm import pieces


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b for frozen W and b, which keeps neither x nor the gathered W for the backward pass.

    Torch's own keeps Wᵀ, a view, so that a gathered weight would stay in memory from the forward to the backward pass
    although ZeRO has let go of it: the whole LLM in the end. Here the parameter itself is kept, an empty shell until
    ZeRO has gathered it again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None, None


def _frozen_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return FrozenLinear.apply(x, module.weight, module.bias)


def _release_recomputed_weights() -> None:
    """Let a weight that was gathered to recompute a layer go with its own module, as any other.

    DeepSpeed 0.19 books the frozen ones to the outermost module of the backward pass, to be released after that
    one's. For an LLM called with `inputs_embeds` as a keyword that moment never comes, and with `model.checkpointing`
    nearly all of the LLM would stay gathered from the first backward pass on. Other versions book nothing.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    if hasattr(coordinator, "update_recompute_parameters"):
        coordinator.update_recompute_parameters = lambda _module, _parameter: None


class Zero3:
    """Every weight of the LLM in equal parts over the ranks of a group.

    Args:
        dtype: of the shards.
        max_live_parameters: gathered parameters kept at once beside the layer at work.
        group: the ranks that share one copy of the LLM; None: all.
    """

    def __init__(self, dtype: torch.dtype, max_live_parameters: int, group: ProcessGroup | None) -> None:
        self._dtype = dtype
        self._group = group
        self._config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {
                "stage": 3,
                # It would replace torch.nn.functional.linear for all modules, the learned ones too (see FrozenLinear).
                "memory_efficient_linear": False,
                "stage3_param_persistence_threshold": 10_000,
                "stage3_max_live_parameters": max_live_parameters,
                "stage3_max_reuse_distance": max_live_parameters,
                "stage3_prefetch_bucket_size": min(max_live_parameters, 50_000_000),
            },
        }

    def load(self, build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
        """Read one piece after another and keep this rank's part of each."""
        import deepspeed
        import deepspeed.ops

        if device.type == "cpu":
            # Else a C++ communication op is compiled at the first launch (25 s, needs ninja and g++).
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        _release_recomputed_weights()
        llm = build()
        for piece in pieces(llm, self._dtype, device):
            for p in piece.parameters():
                # DeepSpeed broadcasts into the weights. Written-to pages of a mapped file would stay in memory.
                p.data = p.data.clone()
            deepspeed.zero.Init(module=piece, data_parallel_group=self._group, config_dict_or_path=self._config)
        for module in llm.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.forward = partial(_frozen_linear, module)  # type: ignore[method-assign]
        for block in expert_blocks(llm):  # gathered as one, since each rank sends its tokens to other experts
            deepspeed.utils.set_z3_leaf_module(block, True)
        self._engine = deepspeed.initialize(model=llm, config=self._config)[0]
        return self._engine.module

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights and take ZeRO's hooks off; put both back whatever happens inside."""
        from deepspeed.runtime.zero import unwrap_model_for_generation

        # One hook DeepSpeed leaves on: at the start of a forward it compares notes with the other ranks, and
        # would wait for ever for one that has nothing left to decode.
        offload = getattr(self._engine.optimizer, "parameter_offload", self._engine.optimizer)
        hooks, number = self._engine.module._forward_pre_hooks, offload.fwd_pre_hook.id
        manager = unwrap_model_for_generation(self._engine)
        manager.__enter__()
        start_of_forward = hooks.pop(number)
        try:
            yield
        finally:
            # DeepSpeed restores its hooks only on a normal exit, so an exception is not shown to it.
            manager.__exit__(None, None, None)
            hooks[number] = start_of_forward
            hooks.move_to_end(number, last=False)

    def bytes_held(self) -> int:
        """Bytes of the shards on this rank (weights gathered now, and small ones kept so, come on top)."""
        return sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self._engine.module.parameters()
                   if not p.requires_grad)  # LoRA's are whole everywhere and belong to the learned part

