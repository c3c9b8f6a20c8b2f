"""From encoder frames to audio tokens of the LLM's width; learned, float32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from listen_dist.schema import ProjectorConfig
from listen_dist.structures import ENCODER_RATE


class Projector(nn.Module, ABC):
    """What both projectors share: the cut into windows, and the way into the LLM's space.

    A window holds `window_frames` frames and becomes one audio token; the last window
    may be short. The output is layer-normed with the deviation of the LLM's token
    embeddings as its initial gain, so that audio starts at the scale of text.
    """

    def __init__(self, config: ProjectorConfig, frame_width: int, llm_width: int, embedding_std: float,
                 audio_width: int) -> None:
        super().__init__()
        self.window_frames = max(1, math.ceil(config.window * ENCODER_RATE - 1e-6))
        self.norm_in = JoinedNorm(frame_width - audio_width, audio_width) if audio_width else nn.LayerNorm(frame_width)
        self.out = nn.Linear(config.hidden, llm_width)
        self.norm_out = nn.LayerNorm(llm_width)
        nn.init.constant_(self.norm_out.weight, embedding_std)

    def tokens_of(self, frames: torch.Tensor) -> torch.Tensor:
        """Audio tokens [B] that so many frames [B] give."""
        return (frames + self.window_frames - 1) // self.window_frames

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames [B, F, E], true lengths [B] → tokens [B, A, D] and true lengths [B].

        What lies behind a row's true length does not reach its tokens.
        """
        hidden, out_lengths = self.hidden(frames, lengths)
        return self.norm_out(self.out(hidden)), out_lengths

    def hidden(self, frames: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same up to the last linear layer: [B, A, hidden] and true lengths [B]."""
        rows, size, width = frames.shape
        window = self.window_frames
        padded = math.ceil(size / window) * window
        mask = torch.arange(padded, device=frames.device) < lengths[:, None]
        frames = nn.functional.pad(frames.float(), (0, 0, 0, padded - size))
        # Before the norm, so that padding gives no gradient whatever it holds; after it, because of its bias.
        normed = self.norm_in(frames.masked_fill(~mask[..., None], 0)).masked_fill(~mask[..., None], 0)
        windows = normed.view(rows, padded // window, window, width)  # [B, A, window, E]
        return self.encode(windows, mask.view(rows, padded // window, window)), self.tokens_of(lengths)

    @abstractmethod
    def encode(self, windows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """windows [B, A, window, E], mask [B, A, window] → [B, A, hidden]."""


class JoinedNorm(nn.ModuleList):
    """A layer norm of its own for each encoder's part of a frame.

    A part that is all zero is one that the encoder has no vector for (see encoders.join_frames); it stays zero.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__(nn.LayerNorm(width) for width in widths)
        self.widths = list(widths)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[…, E] → […, E]."""
        parts = zip(self, frames.split(self.widths, -1), strict=True)
        return torch.cat([norm(part) * part.any(-1, keepdim=True) for norm, part in parts], -1)


class StackedMLP(Projector):
    """The frames of a window side by side through two linear layers (SLAM-ASR's projector)."""

    def __init__(self, config: ProjectorConfig, frame_width: int, llm_width: int, embedding_std: float,
                 audio_width: int) -> None:
        super().__init__(config, frame_width, llm_width, embedding_std, audio_width)
        self.stack = nn.Linear(self.window_frames * frame_width, config.hidden)

    def encode(self, windows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.stack(windows.flatten(2)))


class WindowQFormer(Projector):
    """One learned query a window, BERT-style layers with cross-attention to its frames."""

    def __init__(self, config: ProjectorConfig, frame_width: int, llm_width: int, embedding_std: float,
                 audio_width: int) -> None:
        super().__init__(config, frame_width, llm_width, embedding_std, audio_width)
        self.query = nn.Parameter(torch.randn(1, 1, config.hidden) * 0.02)
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            layer = nn.TransformerDecoderLayer(config.hidden, config.heads, 4 * config.hidden, dropout=0.0,
                                               activation="gelu", batch_first=True)
            # Keys and values straight from the encoder's width, as BERT's cross-attention does.
            layer.multihead_attn = nn.MultiheadAttention(config.hidden, config.heads, kdim=frame_width,
                                                         vdim=frame_width, batch_first=True)
            self.layers.append(layer)

    def encode(self, windows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, count, window, width = windows.shape
        memory = windows.reshape(rows * count, window, width)
        # A window without any frame (padding of a shorter row) may look at zeros: attention over
        # nothing would be NaN, and its token is dropped by the caller anyway.
        ignored = ~mask.reshape(rows * count, window)
        ignored = ignored & ~ignored.all(-1, keepdim=True)
        hidden = self.query.expand(rows * count, -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, memory, memory_key_padding_mask=ignored)
        return hidden.view(rows, count, -1)


def build_projector(config: ProjectorConfig, frame_width: int, llm_width: int, embedding_std: float,
                    audio_width: int = 0) -> Projector:
    """The projector that `projector.kind` names, with fresh weights from torch's generator.

    Args:
        frame_width: E, of both encoders together where there are two.
        llm_width: D.
        embedding_std: deviation of the LLM's token embeddings, the scale that audio tokens start at.
        audio_width: how many of a frame's entries, the last ones, come from the audio encoder (0: there is none).
    """
    kinds = {"mlp": StackedMLP, "qformer": WindowQFormer}
    return kinds[config.kind](config, frame_width, llm_width, embedding_std, audio_width)
