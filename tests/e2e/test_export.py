"""Exports: what is shared answers as the checkpoint does, and starts other runs; other frozen models are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from listen_dist import Listener
from listen_dist.engine import checkpoint, exports
from listen_dist.engine.assembly import assemble
from listen_dist.engine.checkpoint import CheckpointError, TrainState
from listen_dist.engine.optim import build_optimizer
from listen_dist.inference.shell import newest_below
from listen_dist.inference.usage import known_usage
from listen_dist.schema import ConfigError, PoolConfig
from tests import tiny
from tools import export

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


@dataclasses.dataclass
class World:
    tiny: tiny.Tiny
    checkpoint: Path
    encoder: str
    trainable: torch.nn.ModuleDict
    """As it is in the checkpoint."""


@pytest.fixture(scope="module")
def world(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("exporting") / "run"
    config = tiny_world.config("parallel.llm=replicated", f"run_dir={folder}", "train.eval_every=4",
                               f"data.dev=[{{path: {tiny_world.test}}}]")
    model = assemble(config, torch.device("cpu")).model
    with torch.no_grad():
        for p in model.trainable.parameters():
            p.add_(0.3 * torch.randn_like(p))
    optimizer = build_optimizer(model.trainable, config.train)
    snapshot = checkpoint.snapshot(config, TrainState(3), model.trainable, optimizer)
    return World(tiny_world, checkpoint.write(folder / "checkpoints", snapshot), model.encoder.fingerprint,
                 model.trainable)


@pytest.fixture
def exported(world: World, tmp_path: Path) -> Path:
    assert export.main(["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "shared")]) == 0
    return tmp_path / "shared"


def other_llm(world: World, folder: Path) -> Path:
    """The same architecture, one weight changed."""
    shutil.copytree(world.tiny.llm, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_export_may_answer_in_another_way_but_not_be_another_model(world: World, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "shared")]
    with pytest.raises(SystemExit):
        export.main([*words, "pool.prompts=3"])
    assert "'pool.prompts=3': what was trained cannot change" in capsys.readouterr().err
    assert export.main([*words, "eval.beams=2"]) == 0
    assert Listener.from_checkpoint(tmp_path / "shared", device="cpu").config.eval.beams == 2


def test_an_export_answers_like_its_checkpoint(world: World, exported: Path, tmp_path: Path) -> None:
    waves = [tiny.sound(1.3, 3), tiny.sound(0.7, 4)]
    expected = [answer.text for answer in Listener.from_checkpoint(world.checkpoint, device="cpu").generate(waves)]
    moved = shutil.copytree(world.tiny.llm, tmp_path / "elsewhere")  # another place, the same weights
    listener = Listener.from_checkpoint(exported, device="cpu", llm=str(moved))
    assert [answer.text for answer in listener.generate(waves)] == expected
    assert sorted(file.name for file in exported.iterdir()) == [
        "README.md", "config.yaml", "export.json", "trainables.safetensors"]
    assert str(world.tiny.speech) not in (exported / "config.yaml").read_text()


def test_frozen_models_are_found_by_name_among_the_demo_models(world: World, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody trained: the paths of the training machine lead nowhere."""
    assert export.main(["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "shared")]) == 0
    gone = tmp_path / "shared/config.yaml"
    gone.write_text(gone.read_text().replace(str(world.tiny.root), "/nowhere"))
    tree = json.loads((tmp_path / "shared/export.json").read_text())
    tree["sha256"]["config.yaml"] = hashlib.sha256(gone.read_bytes()).hexdigest()
    (tmp_path / "shared/export.json").write_text(json.dumps(tree))
    with pytest.raises(FileNotFoundError, match=r"'/nowhere/llm': no such folder.*--llm"):
        Listener.from_checkpoint(tmp_path / "shared", device="cpu")
    for model in (world.tiny.llm, world.tiny.encoder):
        shutil.copytree(model, tmp_path / "assets/models" / model.name)
    monkeypatch.chdir(tmp_path)
    assert Listener.from_checkpoint("shared", device="cpu").transcribe(tiny.sound(1.3, 3))


def test_fingerprints_are_those_of_the_weights(world: World, exported: Path) -> None:
    frozen = json.loads((exported / "export.json").read_text())["frozen"]
    weights = (world.tiny.llm / "model.safetensors").read_bytes()
    assert frozen["llm"]["fingerprint"] == hashlib.sha256(weights).hexdigest()
    assert frozen["speech_encoder"]["fingerprint"] == world.encoder


def test_another_llm_is_refused_with_the_reason(world: World, exported: Path, tmp_path: Path) -> None:
    llm = other_llm(world, tmp_path / world.tiny.llm.name)
    with pytest.raises(ConfigError, match=rf"model\.llm = '{llm}': is not the model .*embedding space .*train anew"):
        Listener.from_checkpoint(exported, device="cpu", llm=str(llm))
    for start in (exported, world.checkpoint):
        renamed = tmp_path / "renamed"
        if not renamed.exists():
            llm.rename(renamed)
        config = world.tiny.config("parallel.llm=replicated", f"model.llm={renamed}", f"model.init_from={start}")
        with pytest.raises(ConfigError, match="embedding space"):
            exports.start_from(config, world.trainable)


@pytest.mark.parametrize("parts", ["all", "pool", "projector"])
def test_training_starts_from_an_export(world: World, exported: Path, parts: str) -> None:
    words = {"all": [f"model.init_from={exported}"], "projector": [f"projector.init_from={exported}"],
             "pool": [f"model.init_from={exported}", "model.init_projector=false"]}[parts]
    config = world.tiny.config("parallel.llm=replicated", *words)
    fresh = assemble(world.tiny.config("parallel.llm=replicated"), torch.device("cpu")).model.trainable
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    exports.start_from(config, fresh)
    for name, p in fresh.named_parameters():
        source = dict(world.trainable.named_parameters()) if parts in ("all", name.split(".")[0]) else before
        assert torch.equal(p, source[name]), name


def test_half_precision_is_half_the_size(world: World, exported: Path, tmp_path: Path) -> None:
    assert export.main(["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "half"), "--half"]) == 0
    sizes = [(folder / "trainables.safetensors").stat().st_size for folder in (exported, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert Listener.from_checkpoint(tmp_path / "half", device="cpu").transcribe(tiny.sound(1, 1))


def test_the_card_has_the_figures_of_this_checkpoint(world: World, tmp_path: Path) -> None:
    digest = hashlib.sha256((world.checkpoint / "trainables.safetensors").read_bytes()).hexdigest()
    results = {"checkpoint": "x", "checkpoint_sha256": digest, "split": "test", "k": 4, "decoding": {"beams": 1},
               "tasks": {"asr": {"samples": 7, "metric": "wer", "better": "lower", "metrics": {"wer": 0.1234},
                                 "intervals": {"wer": [0.1, 0.2]}, "baseline": {"wer": 1.0}}}}
    file = tmp_path / "results.json"
    words = ["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "shared"), "--results", str(file)]
    file.write_text(json.dumps(results | {"checkpoint_sha256": "0"}))
    assert export.main(words) == 2 and not (tmp_path / "shared").exists()
    file.write_text(json.dumps(results))
    row = {"id": "a", "task": "asr", "text": "", "answers": [""], "prompts": [3, 1, 4, 5], "scores": [0.2] * 4}
    file.with_name("predictions.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "notes.md").write_text("## Licences\nall free\n")
    assert export.main([*words, "--notes", str(tmp_path / "notes.md")]) == 0
    assert known_usage(tmp_path / "shared", PoolConfig(prompts=10)) == {"asr": [0, 1, 0, 1, 1, 1, 0, 0, 0, 0]}
    card = (tmp_path / "shared/README.md").read_text()
    figure = "| asr | 7 | wer (lower is better) | 0.123 | 0.100 … 0.200 | 1.000 |"
    assert card.endswith(f"{figure}\n\n## Licences\nall free\n")


@pytest.mark.parametrize("name", ["trainables.safetensors", "config.yaml", "export.json"])
def test_a_damaged_export_is_refused_by_name(exported: Path, name: str) -> None:
    (exported / name).write_bytes((exported / name).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ".*damaged"):
        exports.resolve(exported)


def test_where_nothing_can_be_written(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path / "file" / "out", "file"), (tmp_path, "is there already")):
        assert export.main(["--checkpoint", str(world.checkpoint), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_latest_is_the_newest_run(world: World, tmp_path: Path) -> None:
    assert newest_below(world.checkpoint.parents[2]) == world.checkpoint
    with pytest.raises(CheckpointError, match="train first, or name a checkpoint"):
        newest_below(tmp_path)
