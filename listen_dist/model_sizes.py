"""How large the models of a config are, from their config.json alone; no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from listen_dist.errors import ListenError
from listen_dist.schema import Config, ConfigError, ProjectorConfig
from listen_dist.structures import ENCODER_RATE

BEATS_PARAMETERS, BEATS_WIDTH, BEATS_HEADS = 90_311_792, 768, 12
"""The published size; the checkpoint has no config.json beside it."""


@dataclass(frozen=True)
class LLMSize:
    """What planning needs to know of an LLM."""

    tensors: tuple[int, ...]
    """Parameters of each of its tensors."""
    layer: int
    """Parameters of one layer."""
    layers: int
    width: int
    heads: int
    attention_width: int
    """Heads times their width; keys and values are counted as wide, since they are repeated for all heads."""
    inner: int
    """Width inside the feed-forward part."""
    vocabulary: int

    @property
    def parameters(self) -> int:
        return sum(self.tensors)

    @property
    def largest(self) -> int:
        """Parameters of its largest tensor (embedding or head), gathered in one piece."""
        return max(self.tensors)


@dataclass(frozen=True)
class Sizes:
    """What planning needs to know of all models of a run."""

    llm: LLMSize
    speech_parameters: int
    speech_width: int
    audio_parameters: int
    """0: no audio encoder."""
    audio_width: int
    projector: int
    """Learned parameters."""
    pool: int


def count(module: nn.Module) -> int:
    """Parameters of a module (whole ones; not for a sharded LLM)."""
    return sum(p.numel() for p in module.parameters())


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList:
    """The LLM's layers: the outermost list as long as its config says (experts may be more, an image encoder as many).

    Raises:
        ListenError: there is none.
    """
    text = llm.config.get_text_config(decoder=True)
    count = getattr(text, "decoder_layers", None) or text.num_hidden_layers
    for part in (llm.get_decoder(), llm):
        for module in part.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ListenError(f"model.llm: {type(llm).__name__} has no list of {count} layers, as its config.json says; an LLM "
                      f"of the family {text.model_type!r} can't be laid out layer by layer")


def llm_size(path: str) -> LLMSize:
    """Count an LLM's parameters on the meta device: its weights are not read."""
    config = _read_config(path, "model.llm")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    width, heads = text.hidden_size, getattr(text, "num_attention_heads", None) or 1  # Mamba has none: as one head
    layers = decoder_layers(llm)
    return LLMSize(
        tensors=tuple(p.numel() for p in llm.parameters()), layer=count(layers[0]), layers=len(layers), width=width,
        heads=heads, attention_width=heads * (getattr(text, "head_dim", None) or width // heads),
        inner=getattr(text, "intermediate_size", None) or 4 * width, vocabulary=text.vocab_size)


def whisper_size(path: str) -> tuple[int, int]:
    """Parameters of a Whisper model's encoder, and its width E.

    Two convolutions over 3 frames, 1,500 positions, per layer 4 E² for attention (keys without bias) and 2 E F for
    the feed-forward part of width F, norms.
    """
    config = _read_config(path, "model.speech_encoder")
    width, inner = config.d_model, config.encoder_ffn_dim
    front = 3 * width * (config.num_mel_bins + width) + 2 * width + config.max_source_positions * width
    layer = 4 * width * width + 3 * width + 2 * width * inner + width + inner + 4 * width
    return front + config.encoder_layers * layer + 2 * width, width


def projector_size(config: ProjectorConfig, frame: int, llm: int) -> int:
    """Learned parameters of the projector for frames of width `frame` and an LLM of width `llm`.

    Window Q-Former of width H, a layer: self-attention 4 H², cross-attention 2 H² + 2 H E, feed-forward 8 H²; MLP over
    windows of n frames: n E H. Both with norms, biases, and H D + D into the LLM's space.
    """
    hidden = config.hidden
    ends = 2 * frame + (hidden + 1) * llm + 2 * llm
    if config.kind == "mlp":
        return ends + (window_frames(config) * frame + 1) * hidden
    layer = 14 * hidden * hidden + 2 * hidden * frame + 19 * hidden
    return ends + hidden + config.layers * layer


def window_frames(config: ProjectorConfig) -> int:
    """Encoder frames that become one audio token."""
    return max(1, math.ceil(config.window * ENCODER_RATE - 1e-6))


def sizes_of(config: Config) -> Sizes:
    """The sizes of a config's models, from their config.json alone.

    Raises:
        ConfigError: a config.json is not there.
    """
    llm = llm_size(config.model.llm)
    speech, width = whisper_size(config.model.speech_encoder)
    audio = (BEATS_PARAMETERS, BEATS_WIDTH) if config.model.audio_encoder else (0, 0)
    return Sizes(llm, speech, width, *audio, projector=projector_size(config.projector, width + audio[1], llm.width),
                 pool=2 * config.pool.prompts * llm.width)


def _read_config(path: str, key: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key} = {path!r}: planning needs its config.json (no weights): put that file into a folder "
                          f"and name it, or let the hub be asked (HF_HUB_OFFLINE=0). {str(error).splitlines()[0]}"
                          ) from error
