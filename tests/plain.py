"""LiSTEN once more, as plainly as possible: the truth that the trainer's own code is held against.

One clip at a time, no padding, no mask, no sharding, the LLM's full logits. It shares nothing with
`listen_dist.models.listen`, `kernels` or `engine`; the projector is the MLP, written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from listen_dist.structures import TextFrame


@dataclass(frozen=True)
class Clip:
    """One clip, as the model meets it."""

    frames: Tensor
    """[F, E] of the frozen encoder."""
    after: list[int]
    target: list[int]
    """EOS included."""
    weight: float = 1.0
    """How often each of its target tokens counts in the loss."""


@dataclass(frozen=True)
class Outcome:
    """What one clip gives."""

    token_loss: Tensor
    """Cross-entropy summed over the target's tokens."""
    mass: Tensor
    """Sum of the chosen prompts' scores."""
    chosen: list[int]
    logits: Tensor
    """[target tokens, V]."""


def audio_tokens(weights: Mapping[str, Tensor], frames: Tensor, window: int) -> Tensor:
    """The MLP projector: frames [F, E] → [A, D]."""
    w = {name.removeprefix("projector."): value for name, value in weights.items()}
    normed = functional.layer_norm(frames, frames.shape[1:], w["norm_in.weight"], w["norm_in.bias"])
    missing = -len(normed) % window
    stacked = torch.cat([normed, normed.new_zeros(missing, normed.shape[1])]).reshape(-1, window * normed.shape[1])
    hidden = functional.gelu(stacked @ w["stack.weight"].T + w["stack.bias"])
    tokens = hidden @ w["out.weight"].T + w["out.bias"]
    return functional.layer_norm(tokens, tokens.shape[1:], w["norm_out.weight"], w["norm_out.bias"])


def embed_context(llm: PreTrainedModel, weights: Mapping[str, Tensor], clip: Clip, frame: TextFrame,
                  window: int, table: Tensor | None = None) -> Tensor:
    """[T, D]: text before, audio, text after."""
    table = llm.get_input_embeddings().weight if table is None else table
    before, after = table[list(frame.before)], table[clip.after]
    return torch.cat([before, audio_tokens(weights, clip.frames, window), after])


def choose(weights: Mapping[str, Tensor], context: Tensor, k: int) -> tuple[Tensor, list[int]]:
    """Scores [N] of all prompts, and the best k of them."""
    query = context.mean(0)
    if "pool.query_mean" in weights:  # pool.query = centred
        var = weights["pool.query_var"]
        query = (query.detach() - weights["pool.query_mean"]) / (var + 1e-5 * var.mean()).sqrt()
    similarity = functional.cosine_similarity(query[None], weights["pool.keys"])
    scores = similarity.softmax(0)
    return scores, scores.topk(k).indices.tolist()


def run_clip(llm: PreTrainedModel, weights: Mapping[str, Tensor], clip: Clip, frame: TextFrame, window: int,
             k: int, table: Tensor | None = None) -> Outcome:
    """One clip through the whole model; `table` is what the LLM's embedding gives, where that isn't its weight."""
    context = embed_context(llm, weights, clip, frame, window, table)
    scores, chosen = choose(weights, context, k)
    table = llm.get_input_embeddings().weight if table is None else table
    sequence = torch.cat([weights["pool.values"][chosen], table[list(frame.bos)], context, table[clip.target]])
    logits = llm(inputs_embeds=sequence[None].to(table.dtype)).logits[0]
    predicting = logits[-len(clip.target) - 1 : -1].float()
    loss = functional.cross_entropy(predicting, torch.tensor(clip.target), reduction="sum")
    return Outcome(loss, scores[chosen].sum(), chosen, predicting)


def total_loss(outcomes: Sequence[Outcome], clips: Sequence[Clip], match_weight: float) -> Tensor:
    """Weighted mean over all target tokens, plus λ times the mean match loss over clips."""
    tokens = sum(clip.weight * len(clip.target) for clip in clips)
    return (sum(clip.weight * outcome.token_loss for clip, outcome in zip(clips, outcomes, strict=True)) / tokens
            - match_weight * sum(outcome.mass for outcome in outcomes) / len(clips))
