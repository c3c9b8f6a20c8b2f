"""Dev evaluations in a real run on two ranks: they change no step, and the best checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import forking, tiny
from tests.fixtures import TrainedRun

pytestmark = pytest.mark.timeout(400)


def test_dev_evaluations_change_nothing_but_what_is_kept(tiny_world: tiny.Tiny, trained: TrainedRun,
                                                         tmp_path: Path) -> None:
    folder = tmp_path / "run"
    forking.run(2, "listen_dist.train", [
        "--config", tiny_world.config_file, f"run_dir={folder}", "train.batches_per_step=2", "train.keep=1",
        "train.eval_every=3", "train.eval_limit=5", f"data.dev=[{{path: {tiny_world.test}}}]"], tmp_path, 300)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line)["loss"] for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == theirs  # hooks, modes and generators are put back
    dev = [row for row in rows if any(key.startswith("dev/") for key in row)]
    assert [row["step"] for row in dev] == [3, 6, 9, 12] and all("dev/asr/wer" in row for row in dev)
    tree = json.loads((folder / "checkpoints/best.json").read_text())
    assert [row["step"] for row in tree["history"]] == [3, 6, 9, 12]
    assert {row["step"]: row["scores"]["asr"] for row in tree["history"]} == {
        row["step"]: row["dev/asr/wer"] for row in dev}
    kept = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {entry["step"] for entry in tree["best"].values()} | {12}
    assert tree["best"]["asr"]["value"] == min(row["dev/asr/wer"] for row in dev)
