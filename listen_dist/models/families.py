"""What differs between families of LLMs: set as their makers mean it, or refused by name as the LLM is loaded.

Two forward passes of a few tokens show what no signature tells: whether the LLM looks ahead, reads embeddings as it
reads tokens, and minds neither its padding nor what else is in its batch.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from listen_dist.errors import ListenError
from listen_dist.schema import ConfigError, ModelConfig

logger = logging.getLogger(__name__)

PROBED = 6
"""Tokens that the two passes compare."""
FAR = 0.25
"""Two computations of the same logits are unlike from here on, as a share of the logits' deviation; bfloat16 rounds
to some 0.02."""

UNFIT = {
    "minimax": "its decoding with a cache isn't what it says of the text at once",
    "moshi": "it says another thing of a padded clip than of the clip alone",
    "recurrent_gemma": "it keeps its state from one batch to the next",
    "reformer": "it computes gradients in training mode alone",
    "roformer": "gradients depend on the batch: off by 1.3 % beside other clips",
    "xmod": "each text needs a language",
    "zamba2": "gradients depend on the batch: off by 2.8 % beside other clips",
}
"""Families of transformers 4.57 that fail where the two passes don't see it (measured by `make families`)."""


def model_class(config: PretrainedConfig, path: str) -> type[PreTrainedModel]:
    """The class that `AutoModelForCausalLM` takes.

    Raises:
        ListenError: it has none, or one that can't work here whatever the weights.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refusal(path, config, "transformers has no causal LLM of this kind")
    if config.model_type in UNFIT:
        raise refusal(path, config, UNFIT[config.model_type])
    found = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    takes = parameters_of(found)
    for name, what in (("inputs_embeds", "embeddings instead of tokens"), ("attention_mask", "a mask of its padding")):
        if name not in takes:
            raise refusal(path, config, f"it takes no {what} ({name})")
    prepare = getattr(found, "prepare_inputs_for_generation", None)
    if not issubclass(found, GenerationMixin) or "inputs_embeds" not in inspect.signature(prepare).parameters:
        raise refusal(path, config, "its code in transformers can't generate from embeddings")
    return found


def refusal(path: str, config: PretrainedConfig, reason: str) -> ListenError:
    return ListenError(f"model.llm = {path!r}: an LLM of the family {config.model_type!r} can't be used: {reason}; "
                       "take another (docs/models.md lists what was tried)")


def parameters_of(llm: PreTrainedModel | type[PreTrainedModel]) -> frozenset[str]:
    """Names that the LLM's forward takes."""
    return _parameters_of(llm.forward if isinstance(llm, type) else type(llm).forward)


@cache  # asked for at every forward pass
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def attention_of(config: PretrainedConfig, found: type[PreTrainedModel], model: ModelConfig) -> str:
    """`model.attention`, or what computes this LLM as its makers mean it.

    Raises:
        ConfigError: flash attention for an LLM that has none, or none that is right.
    """
    asked = model.attention
    text = config.get_text_config(decoder=True)
    only = None
    if asked == "sdpa" and not getattr(found, "_supports_sdpa", False):
        only, why = "eager", "has no other"
    elif asked == "sdpa" and getattr(text, "attn_logit_softcapping", None):
        only, why = "eager", "caps its attention scores, which sdpa leaves out"
    elif asked != "sdpa" and config.model_type == "falcon" and getattr(config, "alibi", False):
        # transformers' eager attention adds ALiBi to the scores and once more with the mask; flash attention has none.
        only, why = "sdpa", "adds its ALiBi bias once with this one alone"
    if only is None:
        if asked == "flash_attention_2" and not getattr(found, "_supports_flash_attn", False):
            raise ConfigError(f"model.attention = {asked!r}: {found.__name__} has none; take sdpa or eager")
        return asked
    logger.info("the LLM is computed with %s attention, not %s: %s %s", only, asked, found.__name__, why)
    return only


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Some layers (OPT, BART's kin) drop out by the flag that `recompute_activations` sets; a frozen LLM never does."""
    for part in [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]:
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def scale_inside_embedding(llm: PreTrainedModel) -> None:
    """Let the embedding itself give what the layers read, where the LLM multiplies tokens' vectors but not given ones.

    So the pool and the audio start at the size that the layers know (Falcon-H1).
    """
    inner = llm.base_model
    factor: Any = getattr(inner, "embedding_multiplier", None)
    if llm.config.model_type == "falcon_h1" and factor not in (None, 1.0):
        embedding_of(llm).register_forward_hook(lambda _module, _inputs, vectors: vectors * factor)
        inner.embedding_multiplier = 1.0  # type: ignore[assignment]


def enable_recomputing(llm: PreTrainedModel, path: str) -> None:
    """Prepare `model.checkpointing`.

    Raises:
        ConfigError: the LLM's code can't recompute a layer, or not by itself.
    """
    if llm.supports_gradient_checkpointing:
        # Reentrant: the other kind compares tensors' shapes, and ZeRO-3 has let go of the weights by then.
        llm.gradient_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False})
        if any(isinstance(module, GradientCheckpointingLayer) for module in llm.modules()):
            return
    raise ConfigError(f"model.checkpointing = True: {type(llm).__name__} ({path}) can't recompute its layers in "
                      "transformers; set it to false, and less data.batch_tokens")


def embedding_of(llm: PreTrainedModel) -> nn.Embedding:
    """Token embeddings [V, D]; D is the width of what the LLM reads, which its layers may widen (OPT-350m)."""
    return cast(nn.Embedding, llm.get_input_embeddings())


def has_plain_cache(llm: PreTrainedModel) -> bool:
    """Whether its cache is keys and values alone, which can be copied, dealt out and gone on from by several tokens."""
    return "past_key_values" in parameters_of(llm) and bool(
        llm._supports_default_dynamic_cache())  # type: ignore[operator]


def check_beams(llm: PreTrainedModel) -> None:
    """Raise ConfigError where transformers can't hand an LLM's state from beam to beam."""
    if not has_plain_cache(llm):
        raise ConfigError(f"eval.beams: {type(llm).__name__} keeps a state that transformers doesn't sort by beams; "
                          "set eval.beams=1")


def expert_blocks(llm: nn.Module) -> list[nn.Module]:
    """The modules that send each token to a few of their experts: ranks use unlike experts at the same time."""
    return [module for module in llm.modules()
            if any(isinstance(child, nn.ModuleList) and "expert" in name for name, child in module.named_children())]


def run(llm: PreTrainedModel, mask: torch.Tensor, last: int, **inputs: Any) -> Any:
    """One call of any family: places are passed on where it takes them, and logits come for the last positions alone.

    Args:
        mask: int64 [B, L], of all tokens that the LLM knows of.
        last: positions whose logits are of use.
        inputs: `inputs_embeds` or `input_ids`, a cache …
    """
    takes = parameters_of(llm)
    new = inputs["inputs_embeds" if "inputs_embeds" in inputs else "input_ids"].shape[1]
    known = {"position_ids": _positions(mask)[:, -new:].contiguous(), "logits_to_keep": last}
    out = llm(attention_mask=mask, **{name: value for name, value in known.items() if name in takes}, **inputs)
    out.logits = out.logits[:, -last:]
    return out


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] counted from each row's first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def probe(llm: PreTrainedModel, path: str, device: torch.device) -> None:
    """Two short forward passes, laid out as it is; every rank must call it.

    Raises:
        ListenError: the LLM looks ahead, reads embeddings otherwise than tokens, or minds padding.
    """
    embedding = embedding_of(llm)
    ids = (torch.arange(PROBED + 3, device=device) * 7919 + 11) % embedding.num_embeddings
    alone = llm(input_ids=ids[None, :PROBED], attention_mask=torch.ones_like(ids[None, :PROBED])).logits[0].float()
    vectors = embedding(ids[None])[0]  # [9, D]
    mask = torch.ones(2, PROBED + 3, dtype=torch.int64, device=device)
    mask[0, :3] = 0
    rows = torch.stack([torch.cat([torch.zeros_like(vectors[:3]), vectors[:PROBED]]), vectors])
    both = run(llm, mask, PROBED + 3, inputs_embeds=rows, use_cache=False).logits.float()
    for reason, ours in (("it reads embeddings otherwise than tokens, or sees tokens that are still to come",
                          both[1, :PROBED]),
                         ("what it says depends on the padding in front of a clip", both[0, 3:])):
        off = float((ours - alone).square().mean().sqrt() / alone.std())
        if not off < FAR:
            raise refusal(path, llm.config, f"{reason} (logits off by {off:.2f} of their deviation)")


def check_tokens(llm: PreTrainedModel, path: str, needed: Sequence[int], eos: int) -> None:
    """Compare the tokenizer with the embedding.

    Raises:
        ListenError: EOS, BOS or the text around the audio has no row in the embedding.
    """
    rows = embedding_of(llm).num_embeddings
    outside = sorted({token for token in (*needed, eos) if token >= rows})
    if outside:
        raise ListenError(
            f"model.llm = {path!r}: its tokenizer gives the ids {outside[:5]}{' (EOS)' if eos in outside else ''}, but "
            f"the embedding has {rows} rows (vocab_size in config.json): set eos_token and bos_token in its "
            "tokenizer_config.json to tokens that the LLM knows, or give it an embedding of the tokenizer's size")
