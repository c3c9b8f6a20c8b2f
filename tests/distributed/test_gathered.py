"""A sharded LLM far larger than the limit is let go of after every step, with recomputation, adapters or neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests import forking, tiny

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

WORKER = "tests.distributed.gathered_worker"
LIMIT = 100_000
LAYERS, LAYER = 6, 4 * 128 * 128 + 3 * 128 * 384
LORA = "lora.rank=2,lora.targets=[q_proj]"
ONLY_LORA = f"{LORA},pool.selection=none,projector.freeze=true,projector.init_from=elsewhere"
"""The adapters alone learn: no gradient comes from in front of the LLM."""
KINDS = {"plain": "", "lora": LORA, "only-lora": ONLY_LORA}
BACKENDS = ("deepspeed", "fsdp2")


@pytest.fixture(scope="module")
def folder(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios, run by two ranks in one launch."""
    folder = tmp_path_factory.mktemp("gathered")
    tokenizer = tiny.build_tokenizer()
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=LAYERS,
        num_attention_heads=4, initializer_range=0.1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "llm")
    usual = f"model.llm={folder / 'llm'},parallel.max_live_parameters={LIMIT}"
    words = [f"{backend}-{kind}-{on}:" + ",".join(filter(None, [
        usual, f"parallel.backend={backend}", f"model.checkpointing={on}", keys]))
        for backend in BACKENDS for kind, keys in KINDS.items() for on in (True, False)]
    forking.run(2, WORKER, [tiny_world.config_file, folder, *words], folder, 600)
    return folder


def notes(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", [True, False])
def test_weights_are_let_go_of(folder: Path, backend: str, kind: str, on: bool) -> None:
    for rank in notes(folder, f"{backend}-{kind}-{on}"):
        print(backend, kind, on, rank)
        assert max(rank["gathered"]) <= LIMIT + LAYER < LAYERS * LAYER / 3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(folder: Path, kind: str) -> None:
    grads = {(backend, on): load_file(folder / f"{backend}-{kind}-{on}-0.safetensors")["grads"]
             for backend in BACKENDS for on in (True, False)}
    truth = grads["fsdp2", False]
    assert truth.any()
    for name, ours in grads.items():
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()), msg=str(name))
    losses = [rank["losses"] for name in grads for rank in notes(folder, f"{name[0]}-{kind}-{name[1]}")]
    assert losses[::2] == [pytest.approx(losses[0], rel=1e-4)] * 4 and losses[0][-1] < losses[0][0]
