"""Training's log says when a pool narrows."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from listen_dist import train
from listen_dist.schema import PoolConfig


def said(effective: list[float], caplog: pytest.LogCaptureFixture, **pool: Any) -> list[tuple[int, str]]:
    """Report number and level of what is logged, one report for each effective number; the first is of warm-up."""
    run: Any = SimpleNamespace(config=SimpleNamespace(pool=PoolConfig(prompts=10, top_k=4, **pool),
                                                      train=SimpleNamespace(warmup_steps=10)), narrow=0)
    found = []
    for number, value in enumerate(effective):
        run.state = SimpleNamespace(step=10 * (number + 1))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=train.logger.name):
            train.warn_of_collapse(run, value)
        found += [(number, record.levelname) for record in caplog.records]
    return found


@pytest.mark.parametrize("effective, expected", [
    ([9.0, 9.0, 8.5, 7.0], []),
    ([4.0, 4.0, 4.0], []),  # of warm-up and two
    ([4.0, 4.0, 9.0, 4.0, 4.0], []),  # one small k alone
    ([4.0, 4.0, 4.0, 5.0, 5.0, 6.0, 4.0], [(3, "WARNING"), (5, "INFO")]),  # once, until it is broad again
    ([0.0] * 5, []),  # nothing was chosen
])
def test_three_narrow_reports_in_a_row_are_said_once(effective: list[float], expected: list[tuple[int, str]],
                                                     caplog: pytest.LogCaptureFixture) -> None:
    assert said(effective, caplog) == expected


def test_a_pool_without_a_choice_is_never_narrow(caplog: pytest.LogCaptureFixture) -> None:
    assert said([4.0] * 6, caplog, selection="attention") == []
