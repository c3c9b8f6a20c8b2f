"""Frozen speech encoders, run on the clip's true length instead of a padded 30 s window."""

from __future__ import annotations

import hashlib
import inspect
import os

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from listen_dist.errors import ListenError


class SpeechEncoder(nn.Module):
    """A frozen Whisper encoder for rows of unlike lengths.

    Hugging Face's own forward takes exactly 3,000 mel frames. Here padding between rows
    reaches neither the convolutions nor the attention, so a clip's frames do not depend
    on what else is in its batch.
    """

    def __init__(self, encoder: WhisperEncoder, config: WhisperConfig) -> None:
        super().__init__()
        self.encoder: WhisperEncoder = encoder.eval().requires_grad_(False)
        self.width: int = config.d_model
        self.mels: int = config.num_mel_bins
        self.max_frames: int = config.max_source_positions
        # transformers 4 wants a head mask as a positional argument, 5 does not know the word.
        takes_head_mask = "layer_head_mask" in inspect.signature(WhisperEncoderLayer.forward).parameters
        self._layer_arguments = {"layer_head_mask": None} if takes_head_mask else {}
        self.fingerprint = fingerprint(encoder)
        self.eval()

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Stay in eval mode whatever the model around does."""
        return super().train(False)

    @staticmethod
    def frames_of(mel_frames: torch.Tensor) -> torch.Tensor:
        """Encoder frames that so many mel frames give: half, rounded up."""
        return (mel_frames + 1) // 2

    @torch.no_grad()
    def forward(self, mel: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a padded batch.

        Args:
            mel: [B, mels, M] log-mel, whatever behind the true length.
            lengths: [B] true mel frames.

        Returns:
            frames [B, F, E] (zeros behind the true length) and true lengths [B].

        Raises:
            ListenError: a clip longer than the encoder's window (30 s).
        """
        encoder = self.encoder
        out_lengths = self.frames_of(lengths)
        if int(out_lengths.max()) > self.max_frames:
            raise ListenError(f"clip of {int(lengths.max()) / 100:.1f} s is longer than the speech encoder's "
                             f"window of {self.max_frames / 50:.0f} s: split it")
        mel_mask = length_mask(lengths, mel.shape[-1])  # [B, M]
        mel = mel.to(encoder.conv1.weight.dtype).masked_fill(~mel_mask[:, None], 0)
        hidden = functional.gelu(encoder.conv1(mel)).masked_fill(~mel_mask[:, None], 0)
        hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2)  # [B, F, E]
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        mask = length_mask(out_lengths, hidden.shape[1])  # [B, F]
        bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        bias = bias.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
        bias = bias.expand(-1, 1, hidden.shape[1], -1)  # [B, 1, F, F]
        for layer in encoder.layers:
            out = layer(hidden, attention_mask=bias, **self._layer_arguments)
            hidden = out[0] if isinstance(out, tuple) else out
        return encoder.layer_norm(hidden).masked_fill(~mask[..., None], 0), out_lengths

    def encode(self, mels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Log-mels [mels, M] of several clips → frames [F, E] each, on the encoder's device."""
        device = self.encoder.conv1.weight.device
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=device)
        padded = pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2).to(device)
        frames, out_lengths = self(padded, lengths)
        return [row[:n] for row, n in zip(frames, out_lengths.tolist(), strict=True)]


def load_speech_encoder(path: str, dtype: torch.dtype) -> SpeechEncoder:
    """Load the encoder half of a Whisper model, frozen.

    Args:
        path: folder or Hugging Face name.
        dtype: type of its weights.

    Raises:
        FileNotFoundError: `path` looks like a folder and does not exist.
    """
    check_model_folder(path, "model.speech_encoder")
    # Loaded in fp32 first: the fingerprint must not depend on the type it computes in.
    model = WhisperModel.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return SpeechEncoder(model.encoder, model.config).to(dtype)


def check_model_folder(path: str, key: str) -> None:
    """Tell a missing folder from a Hugging Face name before a hub is asked, and an empty one from a model.

    Raises:
        FileNotFoundError: naming the config key and the cure.
    """
    if looks_local(path) and not os.path.isdir(path):
        raise FileNotFoundError(f"{key} = {path!r}: no such folder (the demo models come with "
                                "`python tools/get_demo_models.py`)")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{key} = {path!r}: this folder holds no model (its config.json is missing)")
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{key} = {path!r}: neither a folder nor a Hugging Face name that holds a model: "
                                f"{str(error).splitlines()[0]}") from error


def looks_local(path: str) -> bool:
    """Whether a model's name is a path rather than `owner/name` of a hub."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """[B] lengths → bool [B, size], True within the length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def join_frames(speech: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Frames [B, F, E₁] and [B, F', E₂] of the same clips side by side: [B, F, E₁ + E₂].

    Both have 50 a second. The audio encoder's end up to 0.16 s earlier and are filled up with zeros, which the
    projector's norm leaves as they are; what only its padding of a very short clip has brought is cut off.
    """
    missing = speech.shape[1] - audio.shape[1]
    return torch.cat([speech, functional.pad(audio, (0, 0, 0, missing)).to(speech.dtype)], -1)


def fingerprint(encoder: nn.Module) -> str:
    """sha256 over the fp32 weights, whatever type the files hold."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
