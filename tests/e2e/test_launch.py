"""The documented commands, as a user types them: three launchers train, one evaluates."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from listen_dist.data.shards import ShardIndex
from listen_dist.tasks import TASKS
from tests import forking, launching, tiny
from tests.fixtures import TrainedRun
from tools import export

pytestmark = pytest.mark.timeout(1500)


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
"""As in a minimal container or a batch job: Python takes all text for ASCII."""


@pytest.mark.parametrize("launcher, ranks, more, locale", [
    ("torchrun", 2, [], {}), ("python", 1, ["data.workers=1"], PLAIN_LOCALE)])
def test_other_launchers_train(tiny_world: tiny.Tiny, trained: TrainedRun, tmp_path: Path, launcher: str, ranks: int,
                               more: list[str], locale: dict[str, str]) -> None:
    """Two steps; the first two losses are those of the `deepspeed` launch, since the global batches are."""
    command = [*launching.command(launcher, launching.TRAIN, ranks), "--config", tiny_world.config_file,
               f"run_dir={tmp_path / 'run'}", "train.batches_per_step=2", "train.max_steps=2", *more]
    output = launching.run(command, 600, locale).check().output
    assert "step 2/2 | loss" in output and f"rank {ranks - 1} of {ranks} holds" in output and "done." in output
    ours, theirs = ([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()][:2]
                    for folder in (tmp_path / "run", trained.folder))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-000002\n"
    assert (tmp_path / "run/train.log").stat().st_size > 0


def test_the_summary_tells_sizes(trained: TrainedRun) -> None:
    for words in ("learned parameters: pool 1,280", "projector ", "frozen parameters: LLM ", "planned total",
                  "waiting for data", "clips/s", "tokens/s", "left 0"):
        assert words in trained.output, words


def test_the_first_step_tells_where_the_time_went(trained: TrainedRun) -> None:
    """Two ranks, one line; its parts are its sum, and no part is missing."""
    (line,) = [line for line in trained.output.splitlines() if "from the command to the end of the first step" in line]
    found = re.search(r"([0-9.]+) s from the command to the end of the first step: (.*)", line)
    assert found
    parts = {name: float(seconds) for name, seconds in re.findall(r"([a-z ]+) ([0-9.]+) s", found[2])}
    assert [name.strip() for name in parts] == [
        "launcher", "imports", "process group", "models", "weights", "tracker", "data", "step"]
    assert sum(parts.values()) == pytest.approx(float(found[1]), abs=0.5)
    assert parts["launcher"] > 0.5 and all(seconds >= 0 for seconds in parts.values())


Evaluate = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def evaluate(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """The evaluation, started by `deepspeed` or without a launcher."""
    def run(launcher: str, ranks: int, *more: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("results")
        words = ["--config", trained.folder / "config.yaml", "--out", folder / "out", *more]
        if not launcher:
            return folder / "out", forking.run(ranks, "listen_dist.evaluate", words, folder / "logs")[0]
        command = [*launching.command(launcher, launching.EVALUATE, ranks), *words]
        return folder / "out", launching.run(command, 600, PLAIN_LOCALE).check().output

    return run


@pytest.fixture(scope="module")
def greedy(evaluate: Evaluate) -> tuple[Path, str]:
    return evaluate("deepspeed", 2, "eval.batch_tokens=120")


def test_every_sample_is_scored_once_on_two_ranks(greedy: tuple[Path, str], tiny_world: tiny.Tiny) -> None:
    folder, output = greedy
    index = ShardIndex.load(tiny_world.test)
    expected = sorted(name for shard in range(len(index.shards)) for name in index.shard_table(shard).ids)
    assert len(expected) == 7
    rows = predictions(folder)
    assert [row["id"] for row in rows] == expected
    assert all(len(row["prompts"]) == len(row["scores"]) == 4 and row["scores"] == sorted(row["scores"], reverse=True)
               for row in rows)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".evaluation.lock", "eval_skipped.jsonl", "predictions.jsonl", "results.json"]
    assert "silence" in output and "most_frequent" in output and "0 samples skipped" in output


def test_results_have_the_documented_keys(greedy: tuple[Path, str], tiny_world: tiny.Tiny) -> None:
    results, index = read_results(greedy[0]), ShardIndex.load(tiny_world.test)
    assert {task: entry["samples"] for task, entry in results["tasks"].items()} == index.tasks
    for name, entry in results["tasks"].items():
        assert {"samples", "metric", "better", "metrics", "baseline", "baseline_name", "instruction"} <= set(entry)
        assert (entry["metric"], entry["better"]) == (TASKS[name].metric, TASKS[name].better)
        assert entry["metric"] in entry["metrics"] and set(entry["metrics"]) == set(entry["baseline"])
        low, high = entry["intervals"][entry["metric"]]
        assert low <= entry["metrics"][entry["metric"]] <= high
    assert results["tasks"]["asr"]["baseline"]["wer"] == 1.0
    assert results["step"] == 12 and results["k"] == 4 and results["ranks"] == 2 and results["split"] == "test"
    assert results["data_fingerprints"] == {str(tiny_world.test): index.fingerprint}
    assert {"checkpoint", "decoding", "model", "versions", "code_commit", "skipped"} <= set(results)
    assert results["decoding"]["beams"] == 1
    assert {name: entry["answered_by"] for name, entry in results["tasks"].items()} == {
        "asr": {"generation": 4}, "language_id": {"likelihood": 1}, "speech_qa": {"likelihood": 2}}


def test_another_layout_decodes_the_same(greedy: tuple[Path, str], evaluate: Evaluate) -> None:
    """One rank, other batches: the same texts and the same prompts."""
    folder, _ = evaluate("", 1, "eval.batch_tokens=2048")
    for ours, theirs in zip(predictions(folder), predictions(greedy[0]), strict=True):
        assert {key: ours[key] for key in ("id", "text", "prompts")} == {
            key: theirs[key] for key in ("id", "text", "prompts")}
    assert read_results(folder)["tasks"] == read_results(greedy[0])["tasks"]


def test_an_export_is_scored_like_its_checkpoint(greedy: tuple[Path, str], evaluate: Evaluate, trained: TrainedRun,
                                                 tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert export.main(["--checkpoint", str(trained.folder), "--out", str(shared)]) == 0
    folder, output = evaluate("", 1, "--checkpoint", str(shared))
    assert read_results(folder)["tasks"] == read_results(greedy[0])["tasks"]
    assert read_results(folder)["step"] == 12
    assert "never trained" not in output, "an export does not say what it was trained on"


def test_beams(greedy: tuple[Path, str], evaluate: Evaluate) -> None:
    folder, _ = evaluate("", 2, "eval.beams=3", "eval.limit=5")
    assert read_results(folder)["decoding"]["beams"] == 3
    found = predictions(folder)
    assert len(found) == 5
    by_id = {row["id"]: row for row in predictions(greedy[0])}
    assert all(row["prompts"] == by_id[row["id"]]["prompts"] for row in found)


@pytest.mark.parametrize("script", [launching.TRAIN, launching.EVALUATE])
def test_help_imports_nothing_heavy(script: str) -> None:
    code = (f"import runpy, sys\nsys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path({script!r}, run_name='__main__')\nexcept SystemExit: pass\n"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'\n")
    assert "--config" in launching.run([sys.executable, "-c", code], 60).check().output
