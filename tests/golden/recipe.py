"""The demo's recipe on a part of its data: its first 50 steps, on two real ranks with the real models.

    python tests/golden/recipe.py      # writes recipe.json anew, after a change that is meant to change the recipe

All 50 are warm-up, so that they are the same however long the run is to be. Say in the commit why the curve changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent / "recipe.json"
sys.path[:] = [str(FILE.parents[2]), *(p for p in sys.path if Path(p or ".").resolve() != FILE.parent)]

import torch  # noqa: E402

from listen_dist import config as configuration  # noqa: E402
from listen_dist.data.manifest import read_manifest, write_manifest  # noqa: E402
from listen_dist.models.llm import has_compiler  # noqa: E402
from tests import launching  # noqa: E402

STEPS, CLIPS = 50, 120
ASSETS, CONFIG = launching.ROOT / "assets", launching.ROOT / "configs/demo_full.yaml"
LIKE = {"asr_synthetic_full": "asr_synthetic"}
"""The quickstart's manifest begins with the same clips."""


def set_name(path: str) -> str:
    """`asr` for `assets/shards/asr/train`."""
    return Path(path).parent.name


def manifest_of(path: str) -> Path:
    name = set_name(path)
    return ASSETS / f"manifests/{LIKE.get(name, name)}.train.jsonl"


def losses(folder: Path) -> list[float]:
    """Write shards of each set's first clips and train on them; the loss of each step."""
    config = configuration.load(CONFIG)
    sets, manifests = [], []
    for entry in config.data.train:
        name = set_name(entry.path)
        manifests.append(folder / f"{name}.train.jsonl")
        write_manifest(manifests[-1], list(read_manifest(manifest_of(entry.path)))[:CLIPS])
        sets.append(f"{{path: {folder / 'shards' / name / 'train'}, weight: {entry.weight}}}")
    words = [sys.executable, "tools/shard_dataset.py", "--separate", "--features", "speech", "--speech-encoder",
             config.model.speech_encoder, "--workers", "2", *manifests, folder / "shards"]
    launching.run(words, 300).check()
    compiled = str(has_compiler(torch.device("cpu"))).lower()
    words = [*launching.command("deepspeed", launching.TRAIN, 2), "--config", CONFIG, f"run_dir={folder / 'run'}",
             f"data.train=[{', '.join(sets)}]", f"train.max_steps={STEPS}", "train.max_minutes=0", "train.log_every=1",
             "train.eval_every=0", "tracking.mlflow=false", f"model.compile={compiled}"]
    assert config.train.warmup_steps >= STEPS
    launching.run(words, 900).check()
    return [json.loads(line)["loss"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        curve = losses(Path(scratch))
    FILE.write_text(json.dumps([round(loss, 5) for loss in curve]) + "\n")
    print(f"wrote {FILE}")
