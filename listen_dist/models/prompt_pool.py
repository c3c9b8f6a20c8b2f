"""The pool of soft prompts: keys to be matched, values to be put in front of the LLM's input."""

from __future__ import annotations

import torch
from torch import nn

from listen_dist.config import PoolConfig
from listen_dist.kernels.topk_match.op import TopkMatch, topk_match


class PromptPool(nn.Module):
    """N prompts, each one key and one value of the LLM's width D (2·N·D parameters).

    Keys start as N(0, 0.01²), values as the mean of the LLM's token embeddings plus
    N(0, 0.02²) (LiSTEN, arXiv 2505.18517).
    """

    def __init__(self, config: PoolConfig, embedding_mean: torch.Tensor) -> None:
        super().__init__()
        width = embedding_mean.shape[0]
        self.backend = config.backend
        self.keys = nn.Parameter(0.01 * torch.randn(config.prompts, width))
        self.values = nn.Parameter(embedding_mean.float() + 0.02 * torch.randn(config.prompts, width))

    def forward(self, context: torch.Tensor, mask: torch.Tensor, k: int) -> TopkMatch:
        """Pick the best k prompts for each row.

        Args:
            context: [B, T, D] wrapped input (text before, audio, text after), padded anyhow.
            mask: bool [B, T], True where the context is real.
            k: prompts to pick, 1 … N.
        """
        return topk_match(context, mask, self.keys, self.values, k, backend=self.backend)
