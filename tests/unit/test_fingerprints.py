"""What a run goes on with is told by content: same content elsewhere is the same, other content here is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from listen_dist import train as training
from listen_dist.engine import checkpoint, exports, fingerprints
from listen_dist.engine.checkpoint import TrainState
from listen_dist.schema import Config, ConfigError
from tests import tiny
from tests.unit.test_checkpoint import save, trained

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

LLM = "model.llm"


def change_a_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def llm(tiny_world: tiny.Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world.llm, tmp_path / "llm"))


def test_the_same_model_anywhere(tiny_world: tiny.Tiny, llm: Path, tmp_path: Path) -> None:
    known = fingerprints.of_model(str(tiny_world.llm), LLM)
    (tmp_path / "link").symlink_to(llm)
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(settings | {"transformers_version": "9", "_name_or_path": "x"}))
    (llm / "README.md").write_text("a card")
    for path in (str(llm), f"{llm}/", str(tmp_path / "link")):
        assert fingerprints.of_model(path, LLM) == known


def test_another_model_in_the_same_folder(llm: Path) -> None:
    seen = {fingerprints.of_model(str(llm), LLM)}
    change_a_weight(llm, "model.norm.weight")
    seen.add(fingerprints.of_model(str(llm), LLM))
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(settings | {"rope_theta": 123.0}))
    seen.add(fingerprints.of_model(str(llm), LLM))
    (llm / "tokenizer.json").write_text((llm / "tokenizer.json").read_text() + " ")
    seen.add(fingerprints.of_model(str(llm), LLM))
    assert len(seen) == 4


def test_a_folder_of_bin_weights_is_read_but_not_unpickled(llm: Path) -> None:
    (llm / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"model\.llm = '{llm}': holds no weights"):
        fingerprints.of_model(str(llm), LLM)
    (llm / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin",
                                            "b": "pytorch_model-00002-of-00002.bin"}}
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        exports.llm_fingerprint(str(llm))
    for content in (b"1", b"2"):
        (llm / "pytorch_model-00002-of-00002.bin").write_bytes(content)
        assert len(fingerprints.of_model(str(llm), LLM)) == len(exports.llm_fingerprint(str(llm))) == 64


@pytest.mark.parametrize("place", ["start", "end", "middle", "size"])
def test_a_large_file_is_sampled(llm: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE", 1000)
    monkeypatch.setattr(fingerprints, "END", 512)
    monkeypatch.setattr(fingerprints, "BLOCK", 16)
    file = llm / "model.safetensors"
    content = bytearray(file.read_bytes())
    known = fingerprints.of_model(str(llm), LLM)
    if place == "middle":  # as another fine-tuning of the same model
        content[4096:-4096] = bytes(byte ^ 1 for byte in content[4096:-4096])
    elif place == "size":
        content[4096:4096] = b"\0"
    else:
        content[{"start": 9, "end": -1}[place]] ^= 1
    file.write_bytes(content)
    assert fingerprints.of_model(str(llm), LLM) != known


# --- a run that goes on ---------------------------------------------------------------------------


@pytest.fixture
def config(tiny_world: tiny.Tiny, llm: Path, tmp_path: Path) -> Config:
    """A run of two sets, with a checkpoint."""
    for name in ("speech", "sounds"):
        shutil.copytree(getattr(tiny_world, name), tmp_path / name)
    config = tiny_world.config(f"model.llm={llm}", f"run_dir={tmp_path / 'run'}",
                               f"data.train[0].path={tmp_path / 'speech'}", f"data.train[1].path={tmp_path / 'sounds'}",
                               f"data.dev=[{{path: {tiny_world.test}}}]", "train.eval_every=3")
    save(tmp_path / "run/checkpoints", config, TrainState(7, content=fingerprints.of_run(config)), *trained())
    return config


def go_on(config: Config) -> Path:
    found = training.find_resume(config, fingerprints.of_run(config))
    assert found is not None
    return found[0]


def test_moved_content_goes_on(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("llm", "speech"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    (tmp_path / "link").symlink_to(tmp_path / "sounds")
    train = [replace(config.data.train[0], path=f"{tmp_path}/moved-speech/"),
             replace(config.data.train[1], path=str(tmp_path / "link"))]
    swapped = [replace(train[0], path=train[1].path), replace(train[1], path=train[0].path)]
    moved = replace(config, model=replace(config.model, llm=str(tmp_path / "moved-llm")),
                    data=replace(config.data, train=train))
    assert go_on(moved).name == "step-000007" and not caplog.messages
    with pytest.raises(ConfigError, match=r"belongs to another config; these keys differ: data\.train\. "):
        go_on(replace(moved, data=replace(moved.data, train=[replace(train[0], weight=3.0), train[1]])))
    with pytest.raises(ConfigError, match=r"other content than now lies under data\.train\[0\], data\.train\[1\] "):
        go_on(replace(moved, data=replace(moved.data, train=swapped)))
    with pytest.raises(ConfigError, match=r"belongs to another config; these keys differ: data\.train\. "):
        go_on(replace(moved, data=replace(moved.data, train=train[:1])))


def test_shards_written_again_are_refused(config: Config, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "speech")
    tiny.write_set(tmp_path / "speech", tiny.speech_records(9, "other"))
    with pytest.raises(ConfigError, match=r"step-000007: was trained with other content than now lies under "
                                          r"data\.train\[0\] \(shards written again, or another model\)\. Restore it "
                                          r"to go on, or start a new run in another run_dir \(model\.init_from="):
        go_on(config)


def test_an_exchanged_llm_is_refused(config: Config, llm: Path) -> None:
    change_a_weight(llm, "model.norm.weight")
    with pytest.raises(ConfigError, match=r"other content than now lies under model\.llm "):
        go_on(config)
    with pytest.raises(ConfigError, match=r"model\.llm = .* is not the model that .* was trained on"):
        exports.check_frozen(Path(config.run_dir) / "checkpoints/step-000007", config)


def test_another_dev_set_is_said(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_set(tmp_path / "dev", tiny.speech_records(4, "dev"))
    (entry,) = config.data.dev
    go_on(replace(config, data=replace(config.data, dev=[replace(entry, path=str(tmp_path / "dev"))])))
    assert "data.dev[0]: is another set than before; the dev scores" in caplog.text


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(config: Config,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    file = Path(config.run_dir) / "checkpoints/step-000007/state.json"
    tree = json.loads(file.read_text())
    del tree["content"]
    file.write_text(json.dumps(tree))
    with caplog.at_level(logging.WARNING):
        assert go_on(config) == file.parent
    assert "without fingerprints of its data and models" in caplog.text
    assert checkpoint.read_state(file.parent).content == {}
    with pytest.raises(ConfigError, match=r"these keys differ: model\.llm"):
        training.find_resume(replace(config, model=replace(config.model, llm="/else")), fingerprints.of_run(config))
