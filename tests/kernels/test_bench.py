"""The benchmark's table is whole, and what it prints has the names that are promised."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch

from tools import bench_topk


def test_every_shape_is_in_the_table_once() -> None:
    """And a budget that ends in the middle has seen small and large ones, forward and backward."""
    found = [(s.B, s.T, s.N, s.D, s.k, s.backward) for s in bench_topk.shapes(quick=False)]
    grid = itertools.product((1, 8, 64, 512, 4096), (32, 256), (50, 1000, 16384, 65536), (576, 2048, 4096), (1, 20, 64),
                             (False, True))  # fmt: skip
    assert len(found) == 660 and set(found) == {row for row in grid if row[4] <= row[2]}
    assert all(row[2] == 50 for row in found[:120])
    reached = found[:300]
    assert {row[:2] for row in reached if row[2] > 50} == {row[:2] for row in found}
    assert {row[2::3] for row in reached} == {row[2::3] for row in found}


def test_a_row_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measure = bench_topk.measure

    def too_large_forward(row: bench_topk.Row, *words: object) -> None:
        if not row.shape.backward and row.shape.B == 8:
            raise torch.OutOfMemoryError("planted")
        measure(row, *words)

    monkeypatch.setattr(bench_topk, "measure", too_large_forward)
    monkeypatch.setattr(sys, "argv", ["bench_topk.py", "--device", "cpu", "--quick", "--json"])
    assert bench_topk.main() == 1
    printed = json.loads(capsys.readouterr().out)
    assert [(row["B"], row["backward"]) for row in printed["rows"]] == [(1, False), (1, True), (8, True)]
    for row in printed["rows"]:
        assert row["limit_share"] == pytest.approx(row["limit_seconds"] / row["seconds"]["eager"])
    summary = printed["summary"]
    assert {"speedup_eager_geomean", "speedup_compile_geomean", "limit_share_large"} <= set(summary)
    assert summary["left_out"] == [] and [row["error"] for row in summary["failed"]] == ["OutOfMemoryError: planted"]
