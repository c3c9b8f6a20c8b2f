"""Loading never holds more than a rank's part of the LLM and a few of its layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests import launching, tiny
from tests.distributed.scenarios import LAYOUTS

MIB = 2**20
SLACK = 8 * MIB
"""For what is not weights: DeepSpeed's and PyTorch's own records, the first forward."""
pytestmark = pytest.mark.timeout(1800)


def test_memory_of_each_rank_while_it_loads(tiny_world: tiny.Tiny, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llm"
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=16,
                                       num_attention_heads=12, tie_word_embeddings=False)).half()
    # float16 in several files, as 7B models come; bfloat16 is what they are computed in.
    llm.save_pretrained(folder, max_shard_size="60MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = 2 * llm.num_parameters()
    piece = 2 * max(sum(p.numel() for p in module.parameters())
                    for module in (*llm.model.layers, llm.lm_head, llm.model.embed_tokens))
    del llm
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        expected = plain(input_ids=torch.arange(8)[None]).logits[0, -1, :8].tolist()
    del plain
    # glibc would keep freed memory, which would hide what is held.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "262144")
    words = [f"{name}:model.llm={folder},model.dtype=bfloat16,{layout}" for name, layout in LAYOUTS.items()]
    outputs = launching.run_ranks(2, "tests.distributed.loading_worker", [tiny_world.config_file, tmp_path, *words],
                                  tmp_path, seconds=900)
    assert "loading the LLM: 100%" in outputs[0] and "loading the LLM" not in outputs[1]
    ranks = [json.loads((tmp_path / f"loaded-{rank}.json").read_text()) for rank in range(2)]
    print(f"\nLLM {whole / MIB:.0f} MiB, largest piece {piece / MIB:.0f} MiB; MiB of a rank's own memory")
    for name in LAYOUTS:
        for rank, found in enumerate(one[name] for one in ranks):
            print(f"{name:<12} rank {rank}: keeps {found['held'] / MIB:6.1f}, most while loading "
                  f"{found['peak'] / MIB:6.1f}, afterwards {found['after'] / MIB:6.1f}")
            assert found["held"] == (whole if name == "replicated" else whole // 2)
            # The layer at hand, its copy to cut or to send, and (FSDP2) the one before it.
            assert found["peak"] <= found["held"] + 3 * piece + SLACK, "more than its part and a few layers"
            assert found["dtype"] == "torch.bfloat16"
            assert found["logits"] == pytest.approx(expected, abs=0.02)
