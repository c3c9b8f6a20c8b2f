"""The ways of prompting that LiSTEN's pool is compared with; `pool.selection` names one.

None of them chooses, so none has a match loss: their scores say how strongly a prompt counts,
their mass is 0. Prompts stand in the pool's own order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from listen_dist.errors import ListenError
from listen_dist.kernels.topk_match.op import TopkMatch
from listen_dist.kernels.topk_match.reference import masked_mean
from listen_dist.models.prompt_pool import CentredPool, Pool, PromptPool, initial_keys, initial_values
from listen_dist.schema import PoolConfig


class AttentionPool(Pool):
    """All N values in front, each times its own weight: N tokens, v_n · a_n (2·N·D parameters).

    a = softmax(q·K / √D) with the same query q as `similarity`. That the weighted values stay apart,
    rather than being added up into one token, and the scale 1/√D are how LiSTEN's research code does
    it; its choice of the heaviest k is left out. Keys learn from the LLM's loss.
    """

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(initial_keys(config.prompts, embedding_mean))
        self.values = nn.Parameter(initial_values(config.prompts, embedding_mean))

    def prompt_tokens(self, k: int) -> int:
        return len(self.values)

    def table(self) -> torch.Tensor:
        return self.values

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        query = masked_mean(context.float(), mask)  # [B, D]
        weights = (query @ self.keys.T / query.shape[1] ** 0.5).softmax(-1)  # [B, N]
        indices = torch.arange(len(self.values), device=context.device).expand(len(context), -1)
        return _unmatched(weights[..., None] * self.values, weights, indices)


class TaskPool(Pool):
    """Each task owns a fixed part of the pool, all tasks share the rest (N·D parameters, no keys).

    A clip gets its task's own prompts and then the shared ones. Prompts are numbered task by task,
    the shared ones last. The parts carry their task's name in a checkpoint.
    """

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__()
        own, shared = config.task_parts()
        self.own = nn.ParameterDict({task: initial_values(own, embedding_mean) for task in sorted(config.tasks)})
        self.shared = nn.Parameter(initial_values(shared, embedding_mean))

    def prompt_tokens(self, k: int) -> int:
        return len(next(iter(self.own.values()))) + len(self.shared)

    def table(self) -> torch.Tensor:
        return torch.cat([*self.own.values(), self.shared])

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        places = [self.place(task) for task in tasks]
        own = len(next(iter(self.own.values())))
        prompts = torch.stack([torch.cat([self.own[task], self.shared]) for task in tasks])  # [B, own + shared, D]
        common = torch.arange(len(self.own) * own, len(self.own) * own + len(self.shared))
        indices = torch.stack([torch.cat([torch.arange(n * own, (n + 1) * own), common]) for n in places])
        return _unmatched(prompts, _even(prompts), indices.to(context.device))

    def place(self, task: str) -> int:
        """The number of the task's part.

        Raises:
            ListenError: the task owns none.
        """
        known = list(self.own)
        if task not in known:
            raise ListenError(f"pool.selection = 'task_static': no prompts were trained for task {task!r}, only for "
                             f"{', '.join(known)}; leave its clips out, or train with it")
        return known.index(task)


class FixedPrompts(Pool):
    """One learned prompt of N tokens for every clip (N·D parameters)."""

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(initial_values(config.prompts, embedding_mean))

    def prompt_tokens(self, k: int) -> int:
        return len(self.values)

    def table(self) -> torch.Tensor:
        return self.values

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        prompts = self.values.expand(len(context), -1, -1)
        indices = torch.arange(len(self.values), device=context.device).expand(len(context), -1)
        return _unmatched(prompts, _even(prompts), indices)


class NoPrompts(Pool):
    """Nothing in front: the projector alone learns, or LoRA with it."""

    def prompt_tokens(self, k: int) -> int:
        return 0

    def table(self) -> torch.Tensor:
        return torch.zeros(0, 0)

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        prompts = context.new_zeros(len(context), 0, context.shape[2], dtype=torch.float32)
        return _unmatched(prompts, _even(prompts), prompts.new_zeros(len(context), 0, dtype=torch.long))


def _even(prompts: torch.Tensor) -> torch.Tensor:
    """Scores of prompts [B, P, D] that count alike: 1/P."""
    return prompts.new_full(prompts.shape[:2], 1 / max(1, prompts.shape[1]))


def _unmatched(prompts: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor) -> TopkMatch:
    mass = scores.new_zeros(len(prompts))
    return TopkMatch(prompts, scores, indices, mass.sum(), mass)


def build_pool(config: PoolConfig, embedding_mean: torch.Tensor) -> Pool:
    """What `pool.selection` names, with fresh weights from torch's generator."""
    match config.selection:
        case "attention":
            return AttentionPool(config, embedding_mean)
        case "task_static":
            return TaskPool(config, embedding_mean)
        case "fixed":
            return FixedPrompts(config, embedding_mean)
        case "none":
            return NoPrompts()
    return (CentredPool if config.query == "centred" else PromptPool)(config, embedding_mean)
