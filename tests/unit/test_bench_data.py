"""tools/bench_data.py: it runs, and its summary holds what it promises. No figure of speed is tested."""

from __future__ import annotations

import json
import sys

import pytest

from tests import launching, tiny

sys.path.insert(0, str(launching.ROOT / "tools"))

import bench_data

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("one_thread")]


def test_all_pipelines_do_the_same_clips(tiny_world: tiny.Tiny) -> None:
    stages = bench_data.Stages.build(tiny_world.config())
    rows, speed = bench_data.measure_speed(stages, rounds=2, clips=12)
    assert [row["pipeline"] for row in rows] == ["full", "floor", "webdataset", "loose files"]
    assert all(row[key] > 0 for row in rows for key in row if key != "pipeline")
    assert len(speed["over_floor_rounds"]) == 2 and speed["over_floor"] > 0
    balance = bench_data.measure_balance(stages, ranks=2, steps=4)
    assert 0 <= balance["padding_share"] < 0.5 and 0 <= balance["token_imbalance"] < 1
    told = json.loads(bench_data.report(rows, speed | balance, as_json=True))
    assert {"over_floor", "padding_share", "token_imbalance"} <= set(told["summary"]) and len(told["rows"]) == 4
    assert "over_floor: " in bench_data.report(rows, speed | balance, as_json=False)
    memory = bench_data.measure_memory(stages, batches=40, workers=0)
    assert len(memory) == 20 and memory[-1]["batches"] == 40


def test_a_made_up_index_is_loaded_and_gone_on_from() -> None:
    result = bench_data.measure_scale(shards=40, rows=100)
    assert result["samples"] == 4000 and result["plan_microseconds_per_sample"] > 0
