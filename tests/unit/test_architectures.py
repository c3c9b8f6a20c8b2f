"""Any causal LLM of Hugging Face works through the same keys: one step and one decoding of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import assemble
from tests import tiny

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES = {"llama": {}, "vicuna": {"num_key_value_heads": 4}, "qwen2": {}, "qwen3": {"head_dim": 8}, "mistral": {}}


def build(folder: Path, family: str, like: Path) -> None:
    """A random LLM of a family; Qwen's tokenizer has no BOS."""
    tokenizer = AutoTokenizer.from_pretrained(like)
    if family.startswith("qwen"):
        tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    kind = "llama" if family == "vicuna" else family
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SIZES, **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_llm_of_each_family(tiny_world: tiny.Tiny, tmp_path: Path, family: str) -> None:
    build(tmp_path / "llm", family, tiny_world.llm)
    config = tiny_world.config(f"model.llm={tmp_path / 'llm'}", "parallel.llm=replicated", "model.dtype=bfloat16")
    parts = assemble(config, torch.device("cpu"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its gradients can be NaN (see `assemble`)
    assert (parts.text.frame.bos == ()) == family.startswith("qwen")
    refs = [SampleRef(0, 0, row) for row in range(3)]
    out = parts.model(parts.reader(config.data.train, with_targets=True)[refs], 3)
    (out.token_loss_sum + out.match_loss_sum).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parts.model.trainable.parameters())
    assert all(p.grad is None for p in parts.model.llm.parameters())
    ids, _ = parts.model.generate(parts.reader(config.data.train, with_targets=False)[refs], 3, [4, 2, 3])
    assert [len(row) <= limit for row, limit in zip(ids, (4, 2, 3), strict=True)] == [True] * 3
