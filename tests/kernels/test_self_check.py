"""The kernels' own check, and what happens where they fail it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from listen_dist.kernels.topk_match import op, self_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> None:
    op._fault.cache_clear()
    op._say_once.cache_clear()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """In training, and where decoding is the first to use them."""
    monkeypatch.setattr(self_check, "SHAPES", self_check.SHAPES[2:])  # the interpreter is slow
    with mode():
        assert self_check.fault(CPU) == ""


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check.topk_match

    def wrong(context: Tensor, mask: Tensor, keys: Tensor, values: Tensor, k: int, *, backend: op.Backend) -> object:
        match = right(context, mask, keys, values, k, backend="reference")
        return match._replace(scores=match.scores * 1.001) if backend == "triton" else match

    monkeypatch.setattr(self_check, "topk_match", wrong)
    assert self_check.fault(CPU).startswith("scores differs from the reference by")


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("ptxas: not found\nmore")

    monkeypatch.setattr(self_check, "topk_match", fails)
    assert self_check.fault(CPU) == "OSError: ptxas: not found"


def test_auto_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "fault", lambda _: "")
    assert op.choose_backend("auto", gpu) == "triton"
    op._fault.cache_clear()
    monkeypatch.setattr(self_check, "fault", lambda _: "scores differ")
    with caplog.at_level(logging.WARNING):
        assert [op.choose_backend("auto", gpu) for _ in range(2)] == ["reference"] * 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "scores differ" in warnings[0]
