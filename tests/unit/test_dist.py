"""How ranks meet and part. NCCL cannot run here, so torch's own functions are watched instead."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from listen_dist import dist
from listen_dist.errors import ListenError
from tests import launching

pytestmark = pytest.mark.timeout(120)


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


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(dist, "SAY_MISSING", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    found = launching.free_port()
    monkeypatch.setenv("MASTER_PORT", str(found))
    yield found


def test_all_ranks_come(port: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: dist._meet(rank, 3, timedelta(seconds=60)), range(3)))
    assert all(store.check([f"here/{rank}" for rank in range(3)]) for store in stores)


def test_who_does_not_come_is_named(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(dist._meet, 2, 4, timedelta(seconds=1))
        with pytest.raises(dist.dist.DistNetworkError, match=r"of 4 ranks \[1, 3\] didn't come") as caught:
            dist._meet(0, 4, timedelta(seconds=3))
        assert dist.lost_contact(caught.value)
        assert other.exception() is not None and dist.lost_contact(other.exception())  # type: ignore[arg-type]
    assert "waiting for 2 of 4 ranks, which have not come yet: 1, 3" in caplog.text


def test_a_port_that_is_taken_is_said(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ListenError, match=rf"MASTER_PORT = {port}: taken on 127\.0\.0\.1.*--master_port N"):
            dist._meet(0, 2, timedelta(seconds=5))


def test_collectives_called_with_different_things_are_no_lost_rank() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:23")
    wrong = RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4")
    assert dist.lost_contact(gone) and not dist.lost_contact(wrong)
