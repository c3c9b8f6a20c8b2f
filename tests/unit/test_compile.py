"""`model.compile`: the same gradients, compiled in training alone."""

from __future__ import annotations

import pytest
import torch

from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.models import llm
from listen_dist.schema import ConfigError
from tests import tiny

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]
compiles = pytest.mark.skipif(not llm.has_compiler(torch.device("cpu")), reason="no C++ compiler here (g++ or $CXX)")


@pytest.fixture(scope="module")
def both(tiny_world: tiny.Tiny) -> list[Parts]:
    return [assemble(tiny_world.config(f"model.compile={on}", "parallel.llm=replicated", *more), torch.device("cpu"))
            for on, more in ((True, ()), (False, ()), (True, ("model.checkpointing=true",)))]


def gradients(parts: Parts, rows: int) -> dict[str, torch.Tensor]:
    batch = parts.reader(parts.config.data.train, with_targets=True)[[SampleRef(0, 0, row) for row in range(rows)]]
    parts.model.train().zero_grad()
    out = parts.model(batch, 3)
    (out.token_loss_sum + out.match_loss_sum).backward()
    return {name: p.grad for name, p in parts.model.trainable.named_parameters() if p.grad is not None}


@compiles
def test_gradients_are_the_same_for_all_sizes_and_graphs_are_few(both: list[Parts]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    compiled, plain, recomputing = both
    for rows in (4, 3, 1, 2):
        expected = gradients(plain, rows)
        for parts in (compiled, recomputing):
            found = gradients(parts, rows)
            assert set(found) == set(expected)
            for name, grad in expected.items():
                largest = float(grad.abs().max())
                torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * largest, msg=f"{name}, {rows}")
    # For several rows and for one, with and without recomputation; not one a layer or a size.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4


@compiles
def test_adapters_learn_the_same(tiny_world: tiny.Tiny) -> None:
    """LoRA's matrices lie inside the compiled layers."""
    found, expected = (gradients(assemble(tiny_world.config(
        f"model.compile={on}", "parallel.llm=replicated", "lora.rank=2", "pool.selection=none"),
        torch.device("cpu")), 3) for on in (True, False))
    assert set(found) == set(expected) and any(name.startswith("lora.") for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


@compiles
def test_decoding_is_not_compiled(both: list[Parts]) -> None:
    texts = []
    for parts in both[:2]:
        batch = parts.reader(parts.config.data.train, with_targets=False)[[SampleRef(0, 0, row) for row in range(3)]]
        parts.model.train()
        parts.model.eval()
        assert not any("forward" in vars(layer) for layer in llm.decoder_layers(parts.model.llm))
        texts.append(parts.model.generate(batch, 3, [8] * 3)[0])
    assert texts[0] == texts[1]


def test_without_a_compiler_training_is_refused_and_decoding_is_not(
        tiny_world: tiny.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    model = assemble(tiny_world.config("model.compile=true", "parallel.llm=replicated"), torch.device("cpu")).model
    model.eval()
    with pytest.raises(ConfigError, match="C\\+\\+ compiler.*model.compile=false"):
        model.train()


def test_a_sharded_llm_is_refused(tiny_world: tiny.Tiny) -> None:
    with pytest.raises(ConfigError, match="model.compile.*parallel.llm=replicated"):
        tiny_world.config("model.compile=true", "parallel.llm=full")
