"""A committed loss curve: a refactor changes nothing; a change of numbers must explain the new curve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from listen_dist.models.listen import Listen
from listen_dist.structures import Batch, ModelOutput
from tests.golden import regenerate

pytestmark = pytest.mark.timeout(600)


def test_the_loss_curve_is_the_committed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to 1e-9 on any processor: in float64 their last bits differ by 1e-15, and that hardly grows."""
    forward, seen = Listen.forward, set()

    def watched(model: Listen, batch: Batch, k: int) -> ModelOutput:
        out = forward(model, batch, k)
        seen.update({batch.audio.dtype, out.row_loss.dtype, out.prompt_scores.dtype})
        seen.update(p.dtype for p in model.parameters())
        return out

    monkeypatch.setattr(Listen, "forward", watched)
    before = set(os.environ)
    found = regenerate.losses(tmp_path)
    for key in set(os.environ) - before:
        del os.environ[key]
    assert seen == {torch.float64}
    expected = json.loads(regenerate.FILE.read_text())
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 9))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9), "see tests/golden/regenerate.py"
