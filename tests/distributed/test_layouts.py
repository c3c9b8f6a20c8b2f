"""What each layout keeps on a rank, how it decodes, and which ranks share a copy."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from listen_dist import dist
from listen_dist.errors import ListenError
from tests import tiny
from tests.distributed.scenarios import Ranks, alone

pytestmark = pytest.mark.timeout(1800)


def test_each_rank_holds_its_share_of_the_llm(ranks: list[Ranks], tiny_world: tiny.Tiny) -> None:
    sizes = [p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_world.llm).parameters()]
    for found in ranks:
        item = 4 if found.dtype == "float32" else 2
        held = [notes["held"] for notes in found.notes()]
        resident = max(notes["resident"] for notes in found.notes())
        print(f"{found}: holds {held} bytes of {item * sum(sizes):,}, resident after a step {resident:,}")
        assert sum(held) == found.copies * item * sum(sizes)
        assert max(held) - min(held) <= item * len(sizes) * 192  # FSDP2 cuts rows: a row more of each weight at most
        if found.layout == "replicated":
            continue
        if "fsdp2" in found.layout:
            assert resident == max(held), "gathered weights were not let go"
            continue
        small = sum(n for n in sizes if n <= 10_000)  # DeepSpeed leaves them gathered,
        assert resident <= item * (small + max(sizes)), "gathered weights were not let go"  # and fetches one ahead


def test_ranks_decode_the_same_with_whole_and_with_sharded_weights(ranks: list[Ranks]) -> None:
    unlike = 0
    for found in (one for one in ranks if one.dtype == "float32"):
        decoded = [notes["decoded"] for notes in found.notes()]
        for rank, one in enumerate(decoded):
            assert one["whole"] == one["sharded"] and len(one["whole"][0]) <= 2 + 2 * rank
            if "fsdp2" in found.layout:
                assert one["resident_after"] == found.notes()[rank]["held"], "whole weights were not let go"
        assert decoded[0]["whole"] == alone(ranks, found).notes()[0]["decoded"]["whole"]
        unlike = max(unlike, len({str(one["whole"]) for one in decoded}))
    assert unlike > 1, "ranks decode alike: nothing was shown"


def test_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 6)
    monkeypatch.setattr(dist, "gather_objects", lambda _: ["b", "a", "b", "a", "b", "c"])
    assert dist.node_ranks(0) == [[0, 2, 4], [1, 3], [5]]
    assert dist.node_ranks(3) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ListenError, match="parallel.node_size = 4: does not divide the 6 ranks"):
        dist.node_ranks(4)
