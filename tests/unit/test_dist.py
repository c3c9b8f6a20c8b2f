"""What NCCL needs of the process groups; it can't run here, so torch's own functions are watched instead."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from listen_dist import dist


@pytest.mark.parametrize(("backend", "failed", "destroyed"), [
    ("nccl", False, 1), ("nccl", True, 0), ("gloo", False, 1), ("gloo", True, 1)])
def test_a_failed_rank_does_not_wait_in_nccl(monkeypatch: pytest.MonkeyPatch, backend: str, failed: bool,
                                             destroyed: int) -> None:
    calls: list[int] = []
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist.dist, "destroy_process_group", lambda: calls.append(1))
    dist.shutdown(failed=failed)
    assert len(calls) == destroyed


def test_the_groups_of_nodes_wait_as_long_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist.dist, "new_subgroups_by_enumeration",
                        lambda ranks, **more: asked.update(more, ranks=ranks) or ("own", []))
    assert dist.node_group(0, 7) == "own"
    assert asked == {"ranks": [[0]], "timeout": timedelta(minutes=7)}
