"""tools/bench_ranks.py: on two real ranks, what the collective calls move is what the planner says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import launching, tiny

pytestmark = pytest.mark.timeout(900)


def test_counted_traffic_is_the_planned_one(tiny_world: tiny.Tiny, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, whose layout moves what "replicated" does and takes twice as long as all others together."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    tiny.save_wider_llm(tmp_path / "llm")
    words = [sys.executable, launching.ROOT / "tools/bench_ranks.py", "--json", "--ranks", "2", "--steps", "1",
             "--config", tiny_world.config_file, f"model.llm={tmp_path / 'llm'}", "model.dtype=bfloat16"]
    output = launching.run(words, 800).check().output
    result, _ = json.JSONDecoder().raw_decode(output[output.index('{\n "threads_a_rank"') :])
    rows = {row["layout"]: row for row in result["rows"]}
    whole = rows["replicated"]["llm_bytes_held"]
    for name, row in rows.items():
        assert row["clips_per_second"] > 0 and row["median_step_seconds"] > 0 and 0 < row["reduction_share"] < 1
        moved = row["gathered"] + row["reduced"]
        if "full" in name:  # each rank plays a node, and half of the weights come from the other one
            assert row["leaves_node"] == pytest.approx(moved)
            assert row["llm_bytes_held"] == pytest.approx(whole / 2, rel=0.02)
            assert moved == pytest.approx(row["planned_into_rank"], rel=0.05), name
        else:
            assert row["gathers"] == 0 and moved == pytest.approx(row["planned_into_node"], rel=0.01)
    assert rows["full (ZeRO-3)"]["gathers"] < rows["full, nothing fetched ahead"]["gathers"]
