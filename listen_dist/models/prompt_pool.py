"""The pool of soft prompts: keys to be matched, values to be put in front of the LLM's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from listen_dist.kernels.topk_match.op import TopkMatch, topk_match, topk_match_query
from listen_dist.kernels.topk_match.reference import masked_mean
from listen_dist.schema import PoolConfig


class Pool(nn.Module, ABC):
    """What stands in front of the LLM's input for each clip. Its rivals are in models/rivals.py."""

    observed = 0
    """Numbers that a row adds to the sums of a step (see `observe`); 0: this kind keeps no statistics."""

    def observe(self) -> torch.Tensor:
        """Sums over the rows of the last forward pass, float32 [observed]; `update` wants them of the global batch."""
        return self.table().new_zeros(0)

    def update(self, sums: torch.Tensor) -> None:
        """Take in the sums of a step that was applied, the same on every rank."""

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """What is matched against the keys, from the mean over the context: [B, D]."""
        return query

    @abstractmethod
    def prompt_tokens(self, k: int) -> int:
        """Tokens in front of every clip where k are asked for; a kind without choice gives its own number."""

    @abstractmethod
    def table(self) -> torch.Tensor:
        """All values [N, D] by their prompts' numbers."""

    @abstractmethod
    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        """The prompts of each row.

        Args:
            context: [B, T, D] wrapped input (text before, audio, text after), padded anyhow.
            mask: bool [B, T], True where the context is real.
            tasks: each row's task.
            k: prompts to pick, 1 … N; used by `similarity` alone.
        """


class PromptPool(Pool):
    """N prompts, each one key and one value of the LLM's width D (2·N·D parameters).

    Keys start as N(0, 0.01²), values as the mean of the LLM's token embeddings plus
    N(0, 0.02²) (LiSTEN, arXiv 2505.18517). The best k by cosine stand in front, best first.
    """

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__()
        self.backend = config.backend
        self.keys = nn.Parameter(initial_keys(config.prompts, embedding_mean))
        self.values = nn.Parameter(initial_values(config.prompts, embedding_mean))

    def prompt_tokens(self, k: int) -> int:
        return k

    def table(self) -> torch.Tensor:
        return self.values

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        return topk_match(context, mask, self.keys, self.values, k, backend=self.backend)


class CentredPool(PromptPool):
    """The same, matched against the query without what all queries have in common.

    Means over wrapped inputs lie close together: template, instruction and the embeddings' own mean make up most
    of them. Cosines to one key are then nearly equal for all clips, the match loss pulls the first winners towards
    the common direction, and they win for every clip. So each dimension of the query is centred and scaled by a
    running mean and variance of the training queries:

        q' = (q − mean) / √(var + 1e-5 · mean over dimensions of var)

    The query is detached: the match loss teaches the keys alone. The statistics are buffers, saved and exported
    with the weights. They move once a step, by the sums over the global batch, with a weight of 0.02, or of 1/t
    in step t while that is more (West 1979); between steps and in evaluation they stand still.
    """

    MOMENTUM = 0.02

    query_mean: torch.Tensor
    query_var: torch.Tensor
    query_steps: torch.Tensor

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__(config, embedding_mean)
        width = len(embedding_mean)
        self.register_buffer("query_mean", torch.zeros(width))  # [D]
        self.register_buffer("query_var", torch.ones(width))  # [D]
        self.register_buffer("query_steps", torch.zeros(()))
        self.observed = 1 + 2 * width
        self._queries = torch.zeros(0, width)

    def forward(self, context: torch.Tensor, mask: torch.Tensor, tasks: Sequence[str], k: int) -> TopkMatch:
        query = masked_mean(context.detach().float(), mask)  # [B, D]
        self._queries = query
        return topk_match_query(self.prepare(query), self.keys, self.values, k, backend=self.backend)

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        floor = 1e-5 * self.query_var.mean() + 1e-20
        return (query - self.query_mean) * (self.query_var + floor).rsqrt()

    def observe(self) -> torch.Tensor:
        """Number of rows, sum of q − mean and sum of its square: around the mean, so that fp32 loses nothing."""
        away = self._queries - self.query_mean
        # Filled, not copied: a copy from the host would wait for the GPU.
        return torch.cat([away.new_full((1,), len(away)), away.sum(0), away.square().sum(0)])

    def update(self, sums: torch.Tensor) -> None:
        count, first, second = sums.split([1, len(self.query_mean), len(self.query_mean)])
        seen = (count > 0).float()  # 0: no clip of the step was usable, and all stays as it is
        count = count.clamp(min=1)
        shift = first / count
        self.query_steps += seen[0]
        weight = seen * (1 / self.query_steps.clamp(min=1)).clamp(min=self.MOMENTUM)
        of_step = second / count - shift.square()
        self.query_var.mul_(1 - weight).add_(weight * of_step + weight * (1 - weight) * shift.square())
        self.query_mean.add_(weight * shift)


def initial_keys(count: int, embedding_mean: torch.Tensor) -> torch.Tensor:
    """[count, D] from N(0, 0.01²)."""
    return 0.01 * torch.randn(count, len(embedding_mean))


def initial_values(count: int, embedding_mean: torch.Tensor) -> torch.Tensor:
    """[count, D] around the mean of the LLM's token embeddings, with deviation 0.02."""
    return embedding_mean.float() + 0.02 * torch.randn(count, len(embedding_mean))
