"""AdamW and learning-rate schedules for the trainables."""

from __future__ import annotations

import math

import torch
from torch import nn

from listen_dist.schema import TrainConfig


def build_optimizer(trainable: nn.ModuleDict, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on the projector's matrices and, by `decay_pool`, the pool; not on norms, biases, LoRA."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in trainable.named_parameters():
        if p.requires_grad:
            decays = name.startswith("projector.") or (config.decay_pool and name.startswith("pool."))
            (decayed if p.dim() >= 2 and decays else plain).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate,
                             betas=(config.beta1, config.beta2))


def learning_rate(config: TrainConfig, step: int, last: int) -> float:
    """The rate of optimizer step `step` (from 0) of a run of `last` steps: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
    done = min(1.0, done)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
