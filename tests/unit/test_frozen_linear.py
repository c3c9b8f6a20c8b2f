"""The linear function of a sharded LLM: torch's result and gradient, and nothing of the weight kept in between."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from listen_dist.engine.zero3 import FrozenLinear

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_released_weight_is_let_go_and_taken_back(with_bias: bool) -> None:
    """As ZeRO does: the weight's data goes after the forward pass and comes back before the backward pass."""
    values = torch.randn(5, 3)
    weight = torch.nn.Parameter(values.clone(), requires_grad=False)
    bias = torch.randn(5) if with_bias else None
    x = torch.randn(2, 4, 3, requires_grad=True)
    out = FrozenLinear.apply(x, weight, bias)
    expected = functional.linear(x, values, bias)
    torch.testing.assert_close(out, expected)
    weight.data = torch.empty(0)
    assert [saved.numel() for saved in out.grad_fn.saved_tensors] == [0]
    weight.data = values.clone()
    (ours,) = torch.autograd.grad(out.square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs)
