"""The pool of soft prompts: keys to be matched, values to be put in front of the LLM's input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from listen_dist.kernels.topk_match.op import TopkMatch, topk_match
from listen_dist.schema import PoolConfig


class Pool(nn.Module, ABC):
    """What stands in front of the LLM's input for each clip. Its rivals are in models/rivals.py."""

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


def initial_keys(count: int, embedding_mean: torch.Tensor) -> torch.Tensor:
    """[count, D] from N(0, 0.01²)."""
    return 0.01 * torch.randn(count, len(embedding_mean))


def initial_values(count: int, embedding_mean: torch.Tensor) -> torch.Tensor:
    """[count, D] around the mean of the LLM's token embeddings, with deviation 0.02."""
    return embedding_mean.float() + 0.02 * torch.randn(count, len(embedding_mean))
