"""The demo's recipe on a part of its data: its first ten steps, on two real ranks with the real models.

    python tests/golden/recipe.py      # writes recipe.json anew, after a change that is meant to change the recipe

All ten are warm-up, so that they are the same however long the run is to be. They are in float32, where rounding
moves a loss little and a processor without bfloat16 has nothing to emulate, and not compiled, which takes as long as
the steps. Say in the commit why the curve changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent / "recipe.json"
sys.path[:] = [str(FILE.parents[2]), *(p for p in sys.path if Path(p or ".").resolve() != FILE.parent)]

from listen_dist import config as configuration  # noqa: E402
from listen_dist.data.manifest import read_manifest, write_manifest  # noqa: E402
from tests import launching  # noqa: E402

STEPS, CLIPS = 10, 48
CURVES = ("loss", "learning_rate")
ASSETS, CONFIG = launching.ROOT / "assets", launching.ROOT / "configs/demo_full.yaml"


def set_name(path: str) -> str:
    """`asr` for `assets/shards/asr/train`."""
    return Path(path).parent.name


def write_manifests(folder: Path, names: list[str]) -> list[Path]:
    """The first clips of each training set in `folder`, made by the demo's recipes; the captions are as they are."""
    recordings = ASSETS / "recordings"
    for recipe, *options in (("phone_prompts.py", "--full", "--recordings", recordings),
                             ("joined_prompts.py", "--clips", str(CLIPS), "--recordings", folder),
                             ("synthetic_speech.py", "--sentences", str(CLIPS), "--perturb", "--name",
                              "asr_synthetic_full", "--recordings", recordings)):
        launching.run([sys.executable, f"tools/prepare/{recipe}", "--out", folder, *options], 300).check()
    manifests = [folder / f"{name}.train.jsonl" for name in names]
    for path in manifests:
        source = path if path.is_file() else ASSETS / "manifests" / path.name
        write_manifest(path, list(read_manifest(source))[:CLIPS])
    return manifests


def curves(folder: Path) -> dict[str, list[float]]:
    """Write shards of each set's first clips and train on them; each of `CURVES` by step."""
    config = configuration.load(CONFIG)
    names = [set_name(entry.path) for entry in config.data.train]
    manifests = write_manifests(folder, names)
    sets = [f"{{path: {folder / 'shards' / name / 'train'}, weight: {entry.weight}}}"
            for name, entry in zip(names, config.data.train, strict=True)]
    words = [sys.executable, "tools/shard_dataset.py", "--separate", "--features", "speech", "--speech-encoder",
             config.model.speech_encoder, "--workers", "2", *manifests, folder / "shards"]
    launching.run(words, 300).check()
    words = [*launching.command("deepspeed", launching.TRAIN, 2), "--config", CONFIG, f"run_dir={folder / 'run'}",
             f"data.train=[{', '.join(sets)}]", f"train.max_steps={STEPS}", "train.max_minutes=0", "train.log_every=1",
             "train.eval_every=0", "tracking.mlflow=false", "model.compile=false", "model.dtype=float32"]
    assert config.train.warmup_steps >= STEPS
    launching.run(words, 900).check()
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in CURVES}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = curves(Path(scratch))
    FILE.write_text(json.dumps({name: [float(f"{value:.6g}") for value in curve] for name, curve in found.items()})
                    + "\n")
    print(f"wrote {FILE}")
