"""Every rival trains on two ranks with a sharded LLM, is saved, goes on exactly, and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import forking, tiny

pytestmark = pytest.mark.timeout(1200)

RIVALS = {
    "attention": "pool.selection=attention",
    "task_static": "pool.selection=task_static",
    "fixed": "pool.selection=fixed;pool.prompts=20",
    "none": "pool.selection=none",
    "lora": "pool.selection=none;lora.rank=8",
}
IN_FRONT = {"attention": 10, "task_static": 7, "fixed": 20, "none": 0, "lora": 0}
SAME = ("loss", "match_loss", "grad_norm", "effective_prompts")


@pytest.fixture(scope="module")
def folder(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rivals")
    forking.run(2, "tests.distributed.rival_worker",
                [tiny_world.config_file, out, *(f"{name}:{words}" for name, words in RIVALS.items())], out, 1100)
    for rank in range(2):
        codes = json.loads((out / f"codes-{rank}.json").read_text())
        assert set(codes) == set(RIVALS) and not any(code for row in codes.values() for code in row)
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-000004/trainables.safetensors")


@pytest.mark.parametrize("name", RIVALS)
def test_broken_off_and_resumed_is_the_unbroken_run(folder: Path, name: str) -> None:
    unbroken, resumed = folder / name / "unbroken", folder / name / "resumed"
    assert [line["step"] for line in lines(resumed)] == [1, 2, 3, 4]
    for ours, theirs in zip(lines(resumed), lines(unbroken), strict=True):
        assert {key: ours[key] for key in SAME} == {key: theirs[key] for key in SAME}
    ours, theirs = tensors(resumed), tensors(unbroken)
    assert set(ours) == set(theirs) and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    first = load_file(unbroken / "checkpoints/step-000002/trainables.safetensors")
    assert not any(torch.equal(value, first[key]) for key, value in theirs.items()), "something did not learn"


@pytest.mark.parametrize("name", RIVALS)
def test_its_scores_name_the_prompts_in_front(folder: Path, name: str) -> None:
    results = json.loads((folder / name / "resumed/results.json").read_text())
    assert results["step"] == 4 and results["k"] == IN_FRONT[name]
    rows = [json.loads(line) for line in (folder / name / "resumed/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and {len(row["prompts"]) for row in rows} == {IN_FRONT[name]}


def test_all_rivals_see_the_same_batches(folder: Path) -> None:
    """`data.batch_prompts` is the same: every rival stands at the same place of the same plan, with as many clips."""
    states = [json.loads((folder / name / "unbroken/checkpoints/step-000004/state.json").read_text())["loader"]
              for name in RIVALS]
    assert all(state == states[0] for state in states) and states[0]["samples"] > 4


@pytest.mark.parametrize("layout", ["replicated", "fsdp2"])
def test_lora_learns_the_same_under_zero3_and_other_layouts(folder: Path, layout: str) -> None:
    sharded, whole = (tensors(folder / "lora" / run) for run in ("unbroken", layout))
    assert sum(value.numel() for key, value in sharded.items() if key.startswith("lora.")) == 3 * 8 * (128 + 96)
    for key, value in sharded.items():
        assert value.dtype == torch.float32
        assert float((value - whole[key]).norm() / whole[key].norm()) < 1e-4, key
