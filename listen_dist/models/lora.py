"""LoRA: the usual adapter, put into the frozen LLM by the `peft` library.

It goes in after the LLM was laid out over the ranks. So its matrices never belong to the sharded
part: they stay whole, float32 and alike on every rank, and are reduced, saved and proved equal
like the pool and the projector. The frozen layers underneath keep their hooks.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from listen_dist.schema import ConfigError, LoraConfig


def add_lora(llm: PreTrainedModel, config: LoraConfig, device: torch.device) -> nn.ParameterDict:
    """Put an adapter around each layer that `lora.targets` names: y = W x + (alpha / rank) B A x.

    A starts random (from torch's generator), B at zero, so that the LLM starts unchanged.

    Returns:
        all A [rank, in] and B [out, rank], by their layer's name (with - for dots).

    Raises:
        ConfigError: no layer of the LLM has such a name.
    """
    import peft  # takes seconds

    options = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    try:
        peft.inject_adapter_in_model(options, llm)
    except ValueError as error:
        raise ConfigError(f"lora.targets = {list(config.targets)}: no layer of model.llm has one of these names "
                          f"({str(error).splitlines()[0][:120]})") from error
    weights = nn.ParameterDict()
    for name, p in llm.named_parameters():
        if p.requires_grad:
            p.data = p.data.to(device, torch.float32)
            weights[name.replace(".default.weight", "").replace(".", "-")] = p
    return weights
