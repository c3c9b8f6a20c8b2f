"""A run that is killed and started again gives the losses of an unbroken one, to the last digit."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import forking, tiny
from tests.fixtures import TrainedRun

pytestmark = pytest.mark.timeout(1800)

STEPS = 12
REPORTED = ("loss", "match_loss", "match_loss_per_key", "grad_norm", "learning_rate", "padding_share",
            "effective_prompts", "skipped_samples", "skipped_steps")


def read_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl by step; a step done again after a kill stands there twice, the last counts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def reported(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key in REPORTED or key.startswith("loss_")}


def words(tiny_world: tiny.Tiny, folder: Path, *more: str) -> list[Any]:
    return ["--config", tiny_world.config_file, f"run_dir={folder}", "train.batches_per_step=2", *more]


def run_until(words: list[Any], folder: Path, logs: Path, step: int) -> None:
    """Start a run on two ranks and SIGKILL all of it as soon as it has reported `step`."""
    ranks = forking.start(2, forking.be_program, ("listen_dist.train", list(map(str, words))), logs)
    try:
        for _ in range(6000):
            if (folder / "metrics.jsonl").is_file() and max(read_metrics(folder), default=0) >= step:
                return
            assert ranks[0].process.is_alive(), ranks[0].output[-6000:]
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached:\n{ranks[0].output[-6000:]}")
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def killed(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, killed past step 5 with checkpoints before it."""
    for _ in range(3):  # a busy machine may let the run end before the kill
        folder = tmp_path_factory.mktemp("killed")
        run_until(words(tiny_world, folder / "run", "train.save_every=2"), folder / "run", folder / "logs", 5)
        if max(read_metrics(folder / "run")) < STEPS:
            return folder / "run"
    raise AssertionError("the run was over before it could be killed, three times")


def test_the_unbroken_run_is_whole(trained: TrainedRun) -> None:
    lines = read_metrics(trained.folder)
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert lines[STEPS]["loss"] < lines[1]["loss"]
    checkpoints = trained.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest", "step-000004", "step-000008", "step-000012"]
    state = json.loads((checkpoints / "step-000012/state.json").read_text())
    assert state["step"] == STEPS and state["loader"]["samples"] > STEPS
    tensors = load_file(checkpoints / "step-000012/trainables.safetensors")
    assert all(name.startswith(("pool.", "projector.")) and value.dtype == torch.float32
               for name, value in tensors.items())
    assert {"pool.keys", "pool.values"} <= set(tensors)
    moments = load_file(checkpoints / "step-000012/optimizer.safetensors")
    assert {key.rpartition("/")[0] for key in moments} == set(tensors)


def lasting(state: Path) -> dict[str, Any]:
    """A checkpoint's state without what depends on the clock and on the folder's name."""
    tree: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    del tree["meter"], tree["sha256"]["config.yaml"]
    return tree


def test_killed_and_resumed_on_two_ranks_is_the_unbroken_run(trained: TrainedRun, killed: Path, tiny_world: tiny.Tiny,
                                                             tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    output = forking.run(2, "listen_dist.train", words(tiny_world, folder, "train.save_every=2"), tmp_path / "logs")
    assert "going on from" in output[0]
    unbroken, resumed = read_metrics(trained.folder), read_metrics(folder)
    assert sorted(resumed) == sorted(unbroken)
    for step, line in unbroken.items():
        assert reported(resumed[step]) == reported(line), f"step {step}"
    last = "checkpoints/step-000012/{}.safetensors"
    for name in ("trainables", "optimizer"):
        a, b = (load_file(path / last.format(name)) for path in (trained.folder, folder))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
    state = "checkpoints/step-000012/state.json"
    assert lasting(folder / state) == lasting(trained.folder / state)


@pytest.mark.parametrize("ranks, layout", [
    (1, ["parallel.llm=replicated"]),
    (4, ["parallel.backend=fsdp2", "parallel.llm=node", "parallel.node_size=2"]),
], ids=["one rank, replicated", "four ranks, FSDP2 in nodes of two"])
def test_resumed_in_another_layout_is_the_unbroken_run(trained: TrainedRun, killed: Path, tiny_world: tiny.Tiny,
                                                       tmp_path: Path, ranks: int, layout: list[str]) -> None:
    """Two ranks with DeepSpeed before. Two of the four have no batch of their own in any step."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    output = forking.run(ranks, "listen_dist.train", words(tiny_world, folder, *layout), tmp_path / "logs")
    assert "going on from" in output[0]
    unbroken, resumed = read_metrics(trained.folder), read_metrics(folder)
    assert sorted(resumed) == sorted(unbroken)
    for step, line in unbroken.items():
        for key, value in reported(line).items():
            assert resumed[step][key] == pytest.approx(value, rel=1e-5), f"{key} of step {step}"
