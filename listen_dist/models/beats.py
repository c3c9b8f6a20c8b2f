"""BEATs (arXiv 2212.09058), a frozen encoder of any sound, run on the clips' true length.

It is read from its authors' checkpoints, a `.pt` that holds `cfg` (sizes) and `model` (weights), with
`weights_only`, so that a file cannot run code. The transformer is speechbrain's; its own loader is not used,
since it leaves it to torch's settings whether a file is unpickled.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from listen_dist.errors import ListenError
from listen_dist.models.encoders import fingerprint, length_mask

PATCH = 16
"""Edge of a patch, in filterbank frames (10 ms each) and in bins."""
BINS = 128
"""Bins of the filterbank: eight patches lie above each other, so 0.16 s gives eight vectors, 50 a second."""


class BeatsEncoder(nn.Module):
    """Frozen BEATs for rows of unlike lengths. Attributes are named as in the authors' checkpoints.

    Args:
        cfg: the checkpoint's sizes (speechbrain's defaults for what it leaves out).
        weights: the checkpoint's tensors; those of a classifier on top (`predictor.…`) are not used.

    Raises:
        ListenError: sizes that no published BEATs has, or weights that do not fit them.
    """

    def __init__(self, cfg: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        speechbrain = implementation()
        sizes = speechbrain.BEATsConfig(cfg)
        if sizes.input_patch_size != PATCH or sizes.layer_norm_first:
            raise ListenError(f"cfg has input_patch_size {sizes.input_patch_size} and layer_norm_first "
                             f"{sizes.layer_norm_first}; all published checkpoints have {PATCH} and False")
        self.width: int = sizes.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, sizes.embed_dim, PATCH, stride=PATCH, bias=sizes.conv_bias)
        self.layer_norm = nn.LayerNorm(sizes.embed_dim)
        self.post_extract_proj = (nn.Linear(sizes.embed_dim, self.width) if sizes.embed_dim != self.width
                                  else nn.Identity())
        self.encoder = speechbrain.TransformerEncoder(sizes)
        try:
            self.load_state_dict({name: value for name, value in weights.items()
                                  if not name.startswith("predictor")})
        except RuntimeError as error:
            raise ListenError(f"its weights do not fit its cfg: {' '.join(str(error).split())[:300]}") from None
        self.fingerprint = fingerprint(self)
        # Weight norm is folded into a plain weight in fp32, before anybody rounds its two parts.
        parametrize.remove_parametrizations(self.encoder.pos_conv[0], "weight")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BeatsEncoder:
        """Stay in eval mode whatever the model around does."""
        return super().train(False)

    @staticmethod
    def frames_of(fbank_frames: torch.Tensor) -> torch.Tensor:
        """Vectors that so many filterbank frames give; a rest of less than 0.16 s gives none."""
        return fbank_frames // PATCH * (BINS // PATCH)

    @torch.no_grad()
    def forward(self, fbank: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a padded batch.

        Args:
            fbank: [B, M, 128] normalised filterbank, at least 16 frames, whatever behind the true length.
            lengths: [B] true filterbank frames.

        Returns:
            frames [B, F, E] in order of time, low bins first (zeros behind the true length), and true lengths [B].
        """
        counts = self.frames_of(lengths)
        fbank = fbank.to(self.patch_embedding.weight.dtype)
        fbank = fbank.masked_fill(~length_mask(lengths, fbank.shape[1])[..., None], 0)
        patches = self.patch_embedding(fbank[:, None])  # [B, E', M / 16, 8]
        hidden = self.post_extract_proj(self.layer_norm(patches.flatten(2).transpose(1, 2)))  # [B, F, E]
        padding = ~length_mask(counts, hidden.shape[1])
        frames, _ = self.encoder(hidden, padding_mask=padding)
        return frames.masked_fill(padding[..., None], 0), counts

    def encode(self, fbanks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Filterbanks [M, 128] of several clips → frames [F, E] each, on the encoder's device."""
        device = self.patch_embedding.weight.device
        lengths = torch.tensor([len(fbank) for fbank in fbanks], device=device)
        frames, counts = self(nn.utils.rnn.pad_sequence(fbanks, batch_first=True).to(device), lengths)
        return [row[:n] for row, n in zip(frames, counts.tolist(), strict=True)]


def load_audio_encoder(path: str, dtype: torch.dtype) -> BeatsEncoder:
    """Load BEATs from its authors' checkpoint format, frozen.

    Call it outside a sharding context: weights that are sharded while they are made cannot be weight-normed.

    Raises:
        FileNotFoundError: no such file.
        ListenError: not a BEATs checkpoint; nothing in it was executed.
    """
    check_audio_checkpoint(path)
    try:
        return BeatsEncoder(*_read_checkpoint(path)).to(dtype)
    except ListenError as error:
        raise ListenError(f"model.audio_encoder = {path!r}: {error}") from error


def check_audio_checkpoint(path: str) -> None:
    """Tell a missing checkpoint.

    Raises:
        FileNotFoundError: naming the config key and the cure.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model.audio_encoder = {path!r}: no such file (a checkpoint from the BEATs authors, "
                                "e.g. BEATs_iter3_plus_AS2M.pt)")


def _read_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    expected = "not a BEATs checkpoint (a .pt file of tensors and plain values under `cfg` and `model`)"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many types for files that are damaged or of another kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ListenError(f"{expected}; nothing in it was executed: {reason}") from error
    cfg, weights = (content.get(key) if isinstance(content, dict) else None for key in ("cfg", "model"))
    if not isinstance(cfg, dict) or not isinstance(weights, dict) or "patch_embedding.weight" not in weights:
        raise ListenError(expected)
    return cfg, weights


def implementation() -> types.ModuleType:
    """speechbrain's module of BEATs; imported late, since only this encoder needs the package.

    Its import would switch on rounded (TF32) products for the whole process; that is refused. It would also leave
    proxies for its old module names in sys.modules, which import optional packages (k2, flair, spacy) at the first
    look at any attribute and fail. What walks sys.modules (inspect, torch.compile, hypothesis) would trip over
    them, so they are taken out; nothing here uses an old name.

    Raises:
        ListenError: the package is not installed.
    """
    os.environ.setdefault("SB_DISABLE_QUIRKS", "allow_tf32,disable_jit_profiling")
    try:
        from speechbrain.lobes.models import beats
    except ImportError as error:
        raise ListenError("BEATs needs the package speechbrain: pip install 'listen_dist[audio]'") from error
    for name, module in list(sys.modules.items()):
        if type(module).__name__ == "DeprecatedModuleRedirect":
            del sys.modules[name]
    return beats
