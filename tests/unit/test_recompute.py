"""`model.checkpointing`: the same gradients from less memory, in training alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from tests import tiny

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

REFS = [SampleRef(0, 0, row) for row in range(4)]


@pytest.fixture(scope="module")
def parts_of(tiny_world: tiny.Tiny) -> Callable[[bool], Parts]:
    """The tiny model with checkpointing and without it."""
    built = {on: assemble(tiny_world.config(f"model.checkpointing={on}", "parallel.llm=replicated"),
                          torch.device("cpu")) for on in (True, False)}
    return built.__getitem__


def gradients(parts: Parts) -> tuple[dict[str, Tensor], int]:
    """Gradients of one batch, and how often the LLM's first layer ran for them."""
    runs: list[int] = []
    mlp = parts.model.llm.get_submodule("model.layers.0.mlp")
    handle = mlp.register_forward_hook(lambda *_: runs.append(1))
    batch = parts.reader(parts.config.data.train, with_targets=True)[REFS]
    parts.model.train().zero_grad()
    out = parts.model(batch, 3)
    (out.token_loss_sum + out.match_loss_sum).backward()
    handle.remove()
    return {name: p.grad for name, p in parts.model.trainable.named_parameters() if p.grad is not None}, len(runs)


def test_gradients_are_the_same_and_layers_run_twice(parts_of: Callable[[bool], Parts]) -> None:
    (ours, twice), (theirs, once) = gradients(parts_of(True)), gradients(parts_of(False))
    assert (twice, once) == (2, 1) and set(ours) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-6, atol=1e-8, msg=name)


def test_only_the_layers_themselves_leave_eval_mode(parts_of: Callable[[bool], Parts]) -> None:
    """Dropout inside them stays off; and all is as it was outside of training."""
    for on in (True, False):
        model = parts_of(on).model
        layers = [module for module in model.train().llm.modules() if module.training]
        assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * (3 if on else 0)
        assert not any(module.training for module in model.eval().llm.modules())


def test_decoding_uses_its_cache(parts_of: Callable[[bool], Parts]) -> None:
    texts = []
    for on in (True, False):
        parts = parts_of(on)
        batch = parts.reader(parts.config.data.train, with_targets=False)[REFS]
        texts.append(parts.model.eval().generate(batch, 3, [8] * len(REFS))[0])
    assert texts[0] == texts[1] and any(texts[0])
