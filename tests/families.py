"""Random tiny LLMs of the families that transformers knows, and how each must answer: the truth of `make families`.

    python -m tests.families [FAMILY …]     tries all (or those named) and prints a table, an hour on two cores

Each is trained a step, decodes (greedily and with beams) and scores choices: one process against plain PyTorch with
the makers' own attention and no padding, two ranks against that process, under ZeRO-3 and FSDP2.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import launching, tiny

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8, "initializer_range": 0.15,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_num_experts": 6, "moe_k": 2,
           "first_k_dense_replace": 1, "n_shared_experts": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_d_ssm": 64, "mamba_chunk_size": 8}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.15}
DECODER = {"is_decoder": True}
WINDOW = 12
"""Shorter than a row, so that a window that isn't there shows."""
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    **{name: BART for name in ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
                               "pegasus", "plbart", "trocr", "whisper")},
    **{name: DECODER for name in ("bert", "bert-generation", "camembert", "electra", "ernie", "roberta", "rembert",
                                  "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
                                  "data2vec-text", "megatron-bert", "roc_bert", "big_bird")},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bloom": {"num_attention_heads": 4}, "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 2}},
    "deepseek_v2": LATENT | EXPERTS | {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": LATENT | EXPERTS,
    "dots1": EXPERTS | {"n_group": 1, "topk_group": 1}, "ernie4_5_moe": EXPERTS | {"moe_layer_start_index": 1},
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "falcon": {"alibi": False}, "falcon-alibi": {"alibi": True, "new_decoder_architecture": False},
    "falcon_h1": MAMBA | {"embedding_multiplier": 3.0}, "falcon_mamba": {"state_size": 8}, "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "flex_olmo": EXPERTS, "gemma": {"hidden_activation": "gelu"},
    "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
                    "query_pre_attn_scalar": 8},
    "glm": {"num_key_value_heads": 2}, "glm4_moe": EXPERTS, "gpt_neo": {"attention_types": [[["global", "local"], 1]],
                                                                       "window_size": WINDOW},
    "gpt_oss": EXPERTS | {"sliding_window": WINDOW},
    "granite": {"embedding_multiplier": 3.0}, "granitemoe": EXPERTS, "granitemoeshared": EXPERTS,
    "granitemoehybrid": MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "longcat_flash": LATENT | {"num_layers": 1, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16,
                               "n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 2},
    "mistral": {"sliding_window": WINDOW}, "mixtral": EXPERTS | {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "modernbert-decoder": {"local_attention": WINDOW}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "olmoe": EXPERTS, "olmo3": {"sliding_window": WINDOW},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16}, "opt-wide": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {"partial_rotary_factor": 0.5}, "phi3": {"sliding_window": WINDOW},
    "phimoe": EXPERTS, "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                             "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"], "feed_forward_size": 64},
    "rwkv": {"attention_hidden_size": 32},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "starcoder2": {"sliding_window": WINDOW}, "xlm": {"causal": True},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": ["mamba", "hybrid"],
              "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "use_mamba_kernels": False,
              "attention_head_dim": 16},
    "zamba2": {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8,
               "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "use_mamba_kernels": False},
}
KIND = {"falcon-alibi": "falcon", "opt-wide": "opt"}
"""The model type of a family that is tried in several ways."""
LEFT_OUT = {"blt": "reads bytes through an encoder of patches"}
"""No tiny one can be made from a config alone, for the reason given (others say it when they are built)."""
BROKEN = ("gemma2", "gemma3_text", "falcon-alibi", "falcon_h1", "qwen3_moe", "deepseek_v3", "phimoe", "opt", "bloom",
          "mamba", "jamba", "lfm2")
"""The short sample that the suite runs: what went wrong once, each for a reason of its own."""


def names() -> list[str]:
    """All families, each way of trying them."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *KIND} - {*LEFT_OUT})


def build(folder: Path, family: str) -> None:
    """A random LLM with the tiny tokenizer; its norms and biases are random too, so that each counts.

    Raises:
        ValueError: its config can't be made tiny.
    """
    tokenizer = tiny.build_tokenizer()
    words = {**SIZES, "vocab_size": len(tokenizer), **SPECIAL.get(family, {})}
    for _ in range(12):
        try:
            config = AutoConfig.for_model(KIND.get(family, family), **words)
            break
        except (AttributeError, NotImplementedError) as error:  # a key that this one derives
            key = next((key for key in words if f"'{key}'" in str(error) or f"`{key}`" in str(error)), None)
            if key is None:
                raise
            words.pop(key)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"its config gives {size:,} parameters")
    torch.manual_seed(5)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in llm.parameters():
            p.add_(0.03 * torch.randn_like(p))
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_plain(folder: Path) -> PreTrainedModel:
    """As its makers mean it: eager attention, which adds nothing but what the code says (Falcon's adds ALiBi twice)."""
    kind = AutoConfig.from_pretrained(folder)
    attention = "sdpa" if getattr(kind, "alibi", False) and kind.model_type == "falcon" else "eager"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention,
                                                dtype=torch.float32).eval().requires_grad_(False)


def run(world: int, backend: str, folder: Path, config_file: Path, families: Sequence[str], seconds: float) -> None:
    """All families in one launch; where it dies or hangs, the next launch goes on behind the culprit."""
    left = list(families)
    while left:
        try:
            launching.run_ranks(world, "tests.distributed.families_worker",
                                [config_file, folder, backend, *left], folder, seconds)
        except AssertionError as error:
            done = [name for name in left if (folder / name / f"{backend}-0.json").exists()]
            if not done or "broken" not in result(folder, done[-1], backend):  # it died before it could say so itself
                culprit = next(name for name in left if name not in done)
                said = str(error).strip().splitlines()
                (folder / culprit / f"{backend}-0.json").write_text(json.dumps({"broken": (said or ["died"])[-1]}))
        left = [name for name in left if not (folder / name / f"{backend}-0.json").exists()]


def result(folder: Path, family: str, backend: str) -> dict[str, Any]:
    file = folder / family / f"{backend}-0.json"
    return json.loads(file.read_text()) if file.exists() else {"broken": "not run"}


def faults(found: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """What differs between two results of the same family."""
    wrong = []
    for name, limit in (("losses", 1e-5), ("grads", 2e-5), ("likelihoods", 1e-3)):
        ours, theirs = torch.tensor(found[name]), torch.tensor(truth[name])
        off = float((ours - theirs).abs().max() / theirs.abs().max())
        if not off <= limit:
            wrong.append(f"{name} off by {off:.1e}")
    wrong += [name for name in ("greedy", "beams") if found[name] is not None and found[name] != truth[name]]
    return wrong


def verdict(folder: Path, family: str, backend: str, against: str = "alone") -> str:
    """`right`, `refused: …` or what is wrong."""
    found = result(folder, family, backend)
    for key in ("refused", "broken"):
        if key in found:
            return f"{key}: {found[key]}"
    truth = result(folder, family, against)
    if "losses" not in truth:
        return f"broken: nothing to compare with ({truth})"
    return "WRONG: " + ", ".join(wrong) if (wrong := faults(found, truth)) else (
        "right" if found["beams"] is not None else "right; beams are refused")


def main(argv: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        config_file = tiny.build(folder / "world").config_file
        built, table = [], {}
        for family in argv or names():
            try:
                build(folder / family, family)
                built.append(family)
            except Exception as error:  # whatever its config wants
                table[family] = ["not built: " + (str(error).splitlines() or [repr(error)])[0][:100], "", ""]
        for world, backend in ((1, "alone"), (2, "deepspeed"), (2, "fsdp2")):
            run(world, backend, folder, config_file, built, 3000)
        for family in built:
            table[family] = [verdict(folder, family, "alone", "plain"), verdict(folder, family, "deepspeed"),
                             verdict(folder, family, "fsdp2")]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print("| family | one process | ZeRO-3, two ranks | FSDP2, two ranks |\n|---|---|---|---|")
    for family in sorted(table):
        print(f"| {family} | " + " | ".join(table[family]) + " |")
    return int(any("WRONG" in cell or "broken" in cell for row in table.values() for cell in row))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
