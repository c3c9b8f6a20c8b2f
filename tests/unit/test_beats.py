"""BEATs on true lengths, against speechbrain's own forward, and what is no BEATs checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from torch import nn
from torch.nn import functional

from listen_dist import evaluate as evaluation
from listen_dist.data.features import Fbank
from listen_dist.data.manifest import write_manifest
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.checkpoint import TrainState, snapshot, write
from listen_dist.engine.optim import build_optimizer
from listen_dist.errors import ListenError
from listen_dist.evaluation.dev import evaluate_dev
from listen_dist.models.beats import BeatsEncoder, implementation, load_audio_encoder
from listen_dist.models.encoders import join_frames
from listen_dist.models.projector import JoinedNorm, build_projector
from listen_dist.schema import ConfigError, ProjectorConfig, SetConfig
from tests import launching, tiny

sys.path.insert(0, str(launching.ROOT / "tools"))

from shard_build import BuildOptions, build
from shard_stats import print_stats, verify_all

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

SECONDS = (0.31, 2.5, 1.02, 3.7, 0.02)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("beats") / "beats.pt"
    tiny.build_audio_encoder(file)
    return file


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> BeatsEncoder:
    return load_audio_encoder(str(checkpoint), torch.float32)


@pytest.fixture(scope="module")
def fbanks() -> list[torch.Tensor]:
    return [Fbank()(tiny.sound(seconds, i)) for i, seconds in enumerate(SECONDS)]


@pytest.mark.parametrize("seconds", [0.175, 0.5, 3.33, 30.0])
def test_a_clip_alone_equals_speechbrain(checkpoint: Path, encoder: BeatsEncoder, seconds: float) -> None:
    """Filterbank and transformer: speechbrain reads the file and the waveform by its own code."""
    theirs = implementation().BEATs(str(checkpoint), freeze=True)
    wave = tiny.sound(seconds, 5)
    expected = theirs(torch.from_numpy(wave)[None], torch.ones(1))[0][0]
    (ours,) = encoder.encode([Fbank()(wave)])
    assert ours.shape == expected.shape and float(expected.std()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_fine_tuned_checkpoint_loses_its_classifier(checkpoint: Path, tmp_path: Path, encoder: BeatsEncoder,
                                                      fbanks: list[torch.Tensor]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["cfg"] |= {"finetuned_model": True, "predictor_class": 5}
    content["model"] |= {"predictor.weight": torch.randn(5, 24), "predictor.bias": torch.randn(5)}
    torch.save(content | {"label_dict": {0: "/m/09x0r"}}, tmp_path / "tuned.pt")
    tuned = load_audio_encoder(str(tmp_path / "tuned.pt"), torch.float32)
    torch.testing.assert_close(tuned.encode(fbanks[1:2])[0], encoder.encode(fbanks[1:2])[0], rtol=1e-5, atol=1e-5)


def test_what_else_is_in_the_batch_does_not_matter(encoder: BeatsEncoder, fbanks: list[torch.Tensor]) -> None:
    lengths = torch.tensor([len(bank) for bank in fbanks])
    rows = [functional.pad(bank, (0, 0, 0, 400 - len(bank)), value=value)
            for bank, value in zip(fbanks, (0.0, 1e4, torch.nan, torch.inf, -7.0), strict=True)]
    frames, counts = encoder(torch.stack(rows), lengths)
    assert torch.equal(counts, encoder.frames_of(lengths))
    for row, bank, count in zip(frames, fbanks, counts, strict=True):
        (alone,) = encoder.encode([bank])
        torch.testing.assert_close(row[:count], alone, rtol=1e-5, atol=1e-5)
        assert not row[count:].any()


@pytest.mark.parametrize("samples, vectors", [(1, 8), (2799, 8), (2800, 8), (5359, 8), (5360, 16), (480_000, 1496)])
def test_fifty_vectors_a_second(encoder: BeatsEncoder, samples: int, vectors: int) -> None:
    """30 s give 1,496 beside Whisper's 1,500."""
    bank = Fbank()(tiny.sound(samples / 16_000, 0))
    assert bank.shape[1] == 128 and int(encoder.frames_of(torch.tensor(len(bank)))) == vectors


def test_it_stays_frozen_and_in_eval_mode(encoder: BeatsEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_bfloat16_has_the_same_fingerprint_and_like_frames(checkpoint: Path, encoder: BeatsEncoder,
                                                           fbanks: list[torch.Tensor]) -> None:
    small = load_audio_encoder(str(checkpoint), torch.bfloat16)
    assert small.fingerprint == encoder.fingerprint and {p.dtype for p in small.parameters()} == {torch.bfloat16}
    # oneDNN's bf16 convolution is wrong for groups of 6 or 8 channels where the processor has AMX (torch 2.11);
    # those of the published BEATs have 48.
    with torch.backends.mkldnn.flags(enabled=False):
        fine, coarse = encoder.encode(fbanks[1:2])[0], small.encode(fbanks[1:2])[0].float()
    assert float((fine - coarse).norm() / fine.norm()) < 0.05


def test_every_module_can_be_looked_at_afterwards() -> None:
    """As inspect, torch.compile and hypothesis do; speechbrain's proxies would import what is not installed."""
    implementation()
    for module in list(sys.modules.values()):
        getattr(module, "__file__", None)


# --- wrong files ----------------------------------------------------------------------------------


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_pickled_object_is_refused_and_not_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    bad = {"cfg": Planted(trap), "model": {}}
    torch.save(bad, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(bad))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ListenError, match=rf"model\.audio_encoder = '.*{name}': not a BEATs checkpoint"):
            load_audio_encoder(str(tmp_path / name), torch.float32)
    assert not trap.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert trap.exists(), "the trap does not work"


@pytest.mark.parametrize("content", [b"", b"no model", None, {"model": {}}, {"cfg": {}, "model": {}}, [1], "cut"],
                         ids=str)
def test_what_is_no_checkpoint_is_named(checkpoint: Path, tmp_path: Path, content: object) -> None:
    file = tmp_path / "some.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "cut":
        file.write_bytes(checkpoint.read_bytes()[:5000])
    else:
        torch.save(content, file)
    with pytest.raises(ListenError, match=r"^model\.audio_encoder = '.*some\.pt': not a BEATs checkpoint") as caught:
        load_audio_encoder(str(file), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cfg, message", [({"encoder_layers": 3}, "weights do not fit its cfg"),
                                          ({"input_patch_size": 8}, "input_patch_size 8"),
                                          ({"layer_norm_first": True}, "layer_norm_first True")], ids=str)
def test_sizes_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path, cfg: dict[str, object],
                                         message: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["cfg"] |= cfg
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ListenError, match=message):
        load_audio_encoder(str(tmp_path / "other.pt"), torch.float32)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.audio_encoder = .*no such file"):
        load_audio_encoder(str(tmp_path / "none.pt"), torch.float32)


# --- beside Whisper -------------------------------------------------------------------------------


def test_frames_are_joined_one_by_one() -> None:
    speech, audio = torch.randn(2, 11, 3), torch.randn(2, 8, 2)
    joined = join_frames(speech, audio)
    assert joined.shape == (2, 11, 5)
    assert torch.equal(joined[..., :3], speech) and torch.equal(joined[:, :8, 3:], audio)
    assert not joined[:, 8:, 3:].any()
    assert torch.equal(join_frames(speech[:, :1], audio), torch.cat([speech[:, :1], audio[:, :1]], -1))


def test_each_part_has_its_own_norm_and_nothing_stays_nothing() -> None:
    norm = JoinedNorm(3, 2)
    for part in norm:
        nn.init.normal_(part.bias)
    frames = torch.randn(4, 5) * 10
    frames[2, 3:] = 0
    expected = torch.cat([functional.layer_norm(frames[:, :3], (3,), bias=norm[0].bias),
                          functional.layer_norm(frames[:, 3:], (2,), bias=norm[1].bias)], 1)
    expected[2, 3:] = 0
    torch.testing.assert_close(norm(frames), expected)


def test_the_projector_has_the_count_of_the_paper() -> None:
    """Two norms have as many parameters as one over both widths."""
    with torch.device("meta"):
        counts = {width: sum(p.numel() for p in build_projector(ProjectorConfig(), 2048, 4096, 1.0, width).parameters())
                  for width in (0, 768)}
    assert counts[0] == counts[768]


@pytest.fixture(scope="module")
def parts(tiny_world: tiny.Tiny, checkpoint: Path) -> Parts:
    return assemble(tiny_world.config(f"model.audio_encoder={checkpoint}", "parallel.llm=replicated"),
                    torch.device("cpu"))


def test_a_clip_in_the_whole_model_does_not_depend_on_its_batch(parts: Parts) -> None:
    reader = parts.reader(parts.config.data.train, with_targets=True)
    refs = [SampleRef(0, 0, row) for row in range(5)]
    with torch.no_grad():
        together = parts.model(reader[refs], 3)
        for i, ref in enumerate(refs):
            alone = parts.model(reader[[ref]], 3)
            torch.testing.assert_close(alone.row_loss[0], together.row_loss[i], rtol=1e-5, atol=1e-5)
            assert torch.equal(alone.prompt_indices[0], together.prompt_indices[i])


def test_the_llm_hears_the_audio_encoder(parts: Parts, encoder: BeatsEncoder) -> None:
    """Its frames stand behind Whisper's, and gradients reach its norm."""
    reader = parts.reader(parts.config.data.train, with_targets=True)
    batch = reader[[SampleRef(1, 0, 0)]]
    frames, lengths = parts.model.frames(batch)
    assert batch.fbank is not None
    (sounds,) = encoder.encode([batch.fbank[0]])
    assert frames.shape == (1, int(lengths[0]), 32 + 24)
    torch.testing.assert_close(frames[0, : len(sounds), 32:], sounds)
    parts.model(batch, 3).token_loss_sum.backward()
    norm = parts.model.projector.norm_in
    assert isinstance(norm, JoinedNorm)
    assert all(p.grad is not None and p.grad.any() for p in norm.parameters())


def test_other_arithmetic_is_left_as_it_was(encoder: BeatsEncoder) -> None:
    """speechbrain's import rounds the products of the whole process where it is let."""
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32


def test_speechbrain_missing_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "speechbrain.lobes.models", None)
    with pytest.raises(ListenError, match=r"pip install 'listen_dist\[audio\]'"):
        load_audio_encoder(str(checkpoint), torch.float32)


def test_stored_frames_of_both_encoders_equal_a_run_of_them(parts: Parts, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    """From a manifest through the shard tool to the frames that the projector gets."""
    records = tiny.sound_records(3)
    for i, record in enumerate(records):
        file = tmp_path / f"{record.id}.wav"
        soundfile.write(file, tiny.sound((0.1, 0.7, 1.3)[i], i), 16_000)
        records[i] = dataclasses.replace(record, audio=(str(file),))
    write_manifest(tmp_path / "m.jsonl", records)
    model = parts.config.model
    options = BuildOptions(60.0, 5.0, model.speech_encoder, audio_encoder=model.audio_encoder)
    (index,) = build({tmp_path / "set": [tmp_path / "m.jsonl"]}, options, workers=1, overwrite=False)
    assert index.audio_features is not None and index.audio_features.width == 24
    verify_all(index, 5.0)
    print_stats(index)
    assert "audio, 24 wide, 50 a second" in capsys.readouterr().out
    refs = [SampleRef(0, 0, row) for row in range(3)]
    entries = [SetConfig(str(tmp_path / "set"))]
    stored = parts.reader(entries, with_targets=True)[refs]
    data = dataclasses.replace(parts.config.data, stored_features=False)
    run = dataclasses.replace(parts, config=dataclasses.replace(parts.config, data=data)).reader(entries, True)[refs]
    assert stored.is_features and not run.is_features and stored.fbank is None
    (frames, counts), (expected, true_counts) = parts.model.frames(stored), parts.model.frames(run)
    assert torch.equal(counts, true_counts) and frames.shape == expected.shape
    for i, count in enumerate(counts.tolist()):
        torch.testing.assert_close(frames[i, :count].float(), expected[i, :count].float(), rtol=1e-2, atol=1e-2)
    text = (tmp_path / "set/index.json").read_text()
    (tmp_path / "set/index.json").write_text(text.replace(index.audio_features.fingerprint, "0" * 64))
    with pytest.raises(ConfigError, match=r"set: its stored features .* another .* than model\.audio_encoder = "):
        parts.reader(entries, with_targets=True)


def test_clips_without_stored_frames_are_scored(checkpoint: Path, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """By the small evaluation while a model trains, and by evaluate.py: choices and free text take other rows."""
    words = (f"model.audio_encoder={checkpoint}", f"run_dir={tmp_path / 'run'}", "parallel.llm=replicated",
             f"data.dev=[{{path: {tiny_world.test}}}]", "train.eval_limit=0")
    config = tiny_world.config(*words)
    parts = assemble(config, torch.device("cpu"))
    assert set(evaluate_dev(parts)) == {"asr", "language_id", "speech_qa"}
    optimizer = build_optimizer(parts.model.trainable, config.train)
    write(tmp_path / "run/checkpoints", snapshot(config, TrainState(1), parts.model.trainable, optimizer))
    assert evaluation.main(["--config", str(tiny_world.config_file), *words]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["skipped"] == 0 and sum(entry["samples"] for entry in results["tasks"].values()) == 7
