"""Whether the LLM is gathered for decoding: what the planner counts, and who decides."""

from __future__ import annotations

import pytest
import torch

from listen_dist.evaluation import placement
from listen_dist.model_sizes import llm_size
from listen_dist.planner import room_for_whole
from tests import tiny

CPU = torch.device("cpu")


def test_the_room_holds_weights_and_twice_the_cache(tiny_world: tiny.Tiny) -> None:
    """A Llama of 3 layers and width 64 in fp32: per token a key and a value of 64 in every layer."""
    size = llm_size(str(tiny_world.llm))
    small, large = (room_for_whole(tiny_world.config(f"eval.batch_tokens={tokens}"), size) for tokens in (800, 1600))
    cache, logits = 2 * 800 * 3 * 2 * 64 * 4, 800 // 8 * size.vocabulary * 4
    assert small == size.parameters * 4 + cache + logits and large - small == cache + logits
    beams = room_for_whole(tiny_world.config("eval.batch_tokens=800", "eval.beams=2"), size)
    assert beams == large


@pytest.mark.parametrize("word, free, expected", [
    ("eval.llm=auto", 0, 1), ("eval.llm=auto", -1, 0), ("eval.llm=whole", -1, 1), ("eval.llm=sharded", 10**12, 0),
])
def test_auto_gathers_only_where_there_is_room(tiny_world: tiny.Tiny, monkeypatch: pytest.MonkeyPatch, word: str,
                                               free: int, expected: bool) -> None:
    config = tiny_world.config(word)
    needed = room_for_whole(config, llm_size(str(tiny_world.llm)))
    monkeypatch.setattr(placement.dist, "world_size", lambda: 2)
    monkeypatch.setattr(placement, "free_bytes", lambda device: needed + free)
    assert placement.gather(config, CPU) == bool(expected)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = [("a", 900), ("a", 880), ("b", 500)]
    monkeypatch.setattr(placement.dist, "gather_objects", lambda value: everywhere)
    assert placement.free_bytes(CPU) == 440
    monkeypatch.undo()
    assert 0 < placement.free_bytes(CPU) < 2**50
