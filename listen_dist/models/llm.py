"""The frozen LLM and its tokenizer, from any Hugging Face folder or name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from listen_dist import logs
from listen_dist.errors import ListenError
from listen_dist.model_sizes import decoder_layers
from listen_dist.models import families
from listen_dist.models.encoders import check_model_folder
from listen_dist.schema import ConfigError, ModelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class EmbeddingStats:
    """The LLM's token embeddings in two figures: where prompts and audio tokens start."""

    mean: torch.Tensor
    """float32 [D]."""
    std: float
    """Root mean square deviation of one entry."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it must know an end-of-sequence token (a BOS may be missing).

    Raises:
        ListenError: no EOS token.
        FileNotFoundError: `path` looks like a folder and does not exist.
    """
    check_model_folder(path, "model.llm")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        raise ListenError(f"model.llm = {path!r}: its tokenizer has no EOS token, so no target could end; "
                         "set eos_token in its tokenizer_config.json")
    return tokenizer


def load_llm(config: ModelConfig) -> PreTrainedModel:
    """Open the LLM in eval mode, without gradients.

    Its weights are views of the mapped files, in the files' own dtype: nothing is read yet, and ranks
    of one node share what will be. `pieces` turns them into weights to compute with.

    Raises:
        ListenError: an LLM that can't be used, with the reason.
    """
    check_model_folder(config.llm, "model.llm")
    kind = AutoConfig.from_pretrained(config.llm)
    found = families.model_class(kind, config.llm)
    attention = families.attention_of(kind, found, config)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            config.llm, config=families.without_dropout(kind), dtype="auto", attn_implementation=attention,
            output_loading_info=True)
        llm, info = both
        head = llm.get_output_embeddings()
    except (ValueError, ImportError, NotImplementedError) as error:
        raise families.refusal(config.llm, kind, (str(error).strip() or repr(error)).splitlines()[0]) from error
    if info["missing_keys"]:
        raise ListenError(f"model.llm = {config.llm!r}: its files lack {len(info['missing_keys'])} weights of "
                          f"{found.__name__} ({min(info['missing_keys'])} …), which would be random")
    if head is None:
        raise families.refusal(config.llm, kind, "it has no output layer of its own")
    families.scale_inside_embedding(llm)
    # Hugging Face hands the head a slice of the sequence. Torch multiplies a strided [B, P, D] row by
    # row and copies the whole [V, D] weight for each, which doubles a step's time on a CPU.
    head.register_forward_pre_hook(_contiguous)
    if config.checkpointing:
        families.enable_recomputing(llm, config.llm)
    return llm.requires_grad_(False).eval()  # type: ignore[no-any-return]


def recompute_activations(llm: nn.Module, active: bool) -> None:
    """Switch on or off what `model.checkpointing` has prepared (nothing, without it).

    transformers recomputes a layer where the layer's own `training` is set. That flag alone is changed, not that of
    the modules inside: dropout stays off. While decoding it must be off, since such a layer uses no cache.
    """
    for module in llm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = active and module.gradient_checkpointing


class CompiledLayers:
    """`torch.compile` over each decoder layer of a whole LLM, to be switched on and off.

    One graph serves all layers and all sizes (a micro-batch of one row has its own). It is compiled at the first
    forward pass that needs it. Decoding goes without: its cache grows with each token.
    """

    def __init__(self, llm: PreTrainedModel) -> None:
        self._layers = decoder_layers(llm)
        self._compiled: list[Callable[..., Any]] = []

    def switch(self, active: bool) -> None:
        """Compiled from now on, or as the class has it.

        Raises:
            ConfigError: no C++ compiler for a CPU.
        """
        if active and not self._compiled:  # not before: torch's compiler takes seconds to import
            if not has_compiler(next(self._layers.parameters()).device):
                raise ConfigError("model.compile needs a C++ compiler on a CPU, and there is no g++ (or $CXX); install "
                                  "one, or set model.compile=false")
            self._compiled = [torch.compile(layer.forward, dynamic=True) for layer in self._layers]
        for i, layer in enumerate(self._layers):
            vars(layer).pop("forward", None)  # the class's own shows again
            if active:
                layer.forward = self._compiled[i]


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: on a CPU a C++ compiler."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def pieces(llm: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
    """The LLM piece by piece: embedding, each layer, head, then the whole for what is left.

    A piece's weights are read, cast and moved when its turn comes. Whoever keeps only a part of it before
    taking the next never holds more than one whole piece. A head tied to the embedding has no turn.
    """
    parts = [llm.get_input_embeddings(), *decoder_layers(llm), llm.get_output_embeddings(), llm]
    owned: list[list[nn.Parameter]] = []
    seen: set[nn.Parameter] = set()
    for part in parts:
        owned.append([p for p in part.parameters() if p not in seen])
        seen.update(owned[-1])
    del seen
    for part, weights in zip(logs.progress(parts, "loading the LLM"), owned, strict=True):
        if weights:
            for p in weights:
                p.data = p.data.to(device, dtype)
            del p
            weights.clear()
            yield part


def _contiguous(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(),)


@torch.no_grad()
def embedding_stats(embedding: nn.Embedding) -> EmbeddingStats:
    """Mean and deviation over the whole vocabulary, through the module's own forward.

    The forward is what works under every sharding; the weight itself may be an empty shard.
    """
    device = next(embedding.parameters()).device
    vectors = embedding(torch.arange(embedding.num_embeddings, device=device)).float()  # [V, D]
    mean = vectors.mean(0)
    return EmbeddingStats(mean.cpu(), float((vectors - mean).square().mean().sqrt()))
