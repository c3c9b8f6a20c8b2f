"""Whom the watchdog names, from what the ranks say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from listen_dist.engine.watchdog import Watchdog

STEP, LOADER = "step.py:84 train_step", "train.py:243 train > loader.py:90 read"


@pytest.mark.parametrize(("places", "named", "rest"), [
    ([(STEP, True), (LOADER, False), (STEP, True)], [1], f"ranks 0, 2 wait in {STEP}"),  # gloo: waiting shows
    ([(STEP, False)] * 5 + [(LOADER, False)] + [(STEP, False)] * 2, [5], f"ranks 0, 1, 2, 3, 4, 6, 7 wait in {STEP}"),
    ([(STEP, False), (LOADER, False)], [0, 1], ""),  # NCCL, two ranks: cannot be told
    ([(STEP, False)] * 4, [], f"all ranks are at {STEP}"),
])
def test_the_rank_that_the_others_wait_for(tmp_path: Path, places: list[tuple[str, bool]], named: list[int],
                                           rest: str) -> None:
    watchdog = Watchdog(60, tmp_path)
    watchdog._world = len(places)
    for rank, (place, waiting) in enumerate(places):
        watchdog._note(rank, "process 1 on a", 3, place, waiting, 1)
    parts = watchdog.diagnosis().split("; ")
    found = [part for part in watchdog.diagnosis().split("rank ") if "holds the others up" in part]
    assert [int(part.split()[0]) for part in found] == named
    assert not rest or parts[-1] == rest


def test_a_run_that_goes_on_is_not_after_step_0(tmp_path: Path) -> None:
    assert Watchdog(60, tmp_path, step=30)._step == 30
