"""A committed loss curve: a refactor changes nothing; a change of numbers must explain the new curve."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import tiny
from tests.golden import regenerate

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]


def test_the_loss_curve_is_the_committed_one(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """Equal up to 1e-6: processors differ in the last bits of their products."""
    before = set(os.environ)
    found = regenerate.losses(tiny_world, tmp_path / "run")
    for key in set(os.environ) - before:
        del os.environ[key]
    expected = json.loads(regenerate.FILE.read_text())
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 9))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6), "see tests/golden/regenerate.py"
