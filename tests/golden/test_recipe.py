"""The demo's recipe still learns as it did: its first 50 steps against a committed curve."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.golden import recipe

MISSING = [path for path in ("models", "manifests/caption.train.jsonl") if not (recipe.ASSETS / path).exists()]

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(MISSING), reason="no models and recordings in assets/ (make models recordings)"),
]


def test_the_first_steps_are_the_committed_ones(tmp_path: Path) -> None:
    """In bf16, where processors round differently and a step's loss follows: so means of ten steps."""
    found, expected = recipe.losses(tmp_path), json.loads(recipe.FILE.read_text())
    assert len(found) == len(expected) == recipe.STEPS
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    for start in range(0, recipe.STEPS, 10):
        ours, theirs = (statistics.mean(curve[start : start + 10]) for curve in (found, expected))
        assert ours == pytest.approx(theirs, rel=0.05), f"steps {start + 1} to {start + 10}; see tests/golden/recipe.py"
