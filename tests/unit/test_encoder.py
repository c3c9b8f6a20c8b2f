"""The speech encoder on true lengths, against Hugging Face's own forward on a padded 30 s."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from listen_dist.data.decode import decode_audio
from listen_dist.data.features import LogMel
from listen_dist.data.manifest import read_manifest
from listen_dist.errors import ListenError
from listen_dist.models.encoders import SpeechEncoder, check_model_folder, load_speech_encoder
from tests import tiny
from tests.launching import ROOT

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

DEMO = ROOT / "assets/models/whisper-tiny.en"
RECORDINGS = ROOT / "assets/manifests/asr.test.jsonl"
SECONDS = (0.31, 2.5, 1.02, 3.7, 0.02)


@pytest.fixture(scope="module")
def encoder(tiny_world: tiny.Tiny) -> SpeechEncoder:
    return load_speech_encoder(str(tiny_world.encoder), torch.float32)


@pytest.fixture(scope="module")
def log_mel(tiny_world: tiny.Tiny) -> LogMel:
    return LogMel.from_pretrained(str(tiny_world.encoder))


@pytest.fixture(scope="module")
def mels(log_mel: LogMel) -> list[torch.Tensor]:
    return [log_mel(tiny.sound(seconds, i)) for i, seconds in enumerate(SECONDS)]


def hugging_face(folder: Path, wave: np.ndarray) -> torch.Tensor:
    """Frames [1500, E] of the padded clip by transformers alone."""
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    model = WhisperModel.from_pretrained(folder).eval()
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        return model.encoder(features).last_hidden_state[0]


def test_a_clip_of_30_s_equals_hugging_face(tiny_world: tiny.Tiny, encoder: SpeechEncoder, log_mel: LogMel) -> None:
    wave = tiny.sound(30.0, 9)
    (ours,) = encoder.encode([log_mel(wave)])
    theirs = hugging_face(tiny_world.encoder, wave)
    assert ours.shape == theirs.shape == (1500, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seconds", [0.31, 1.5, 6.0])
def test_a_short_clip_equals_hugging_face_with_a_window_of_its_length(tiny_world: tiny.Tiny, encoder: SpeechEncoder,
                                                                      log_mel: LogMel, seconds: float) -> None:
    mel = log_mel(tiny.sound(seconds, 3))[:, : round(seconds * 100) // 2 * 2]
    weights = WhisperModel.from_pretrained(tiny_world.encoder).state_dict()
    config = WhisperConfig.from_pretrained(tiny_world.encoder, max_source_positions=mel.shape[1] // 2)
    weights["encoder.embed_positions.weight"] = weights["encoder.embed_positions.weight"][: mel.shape[1] // 2]
    model = WhisperModel(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        theirs = model.encoder(mel[None]).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode([mel])[0], theirs, rtol=1e-5, atol=1e-5)


def difference(folder: Path, encoder: SpeechEncoder, wave: np.ndarray, what: str) -> float:
    """Relative difference to the padded encoder over the clip's own frames, printed."""
    (ours,) = encoder.encode([LogMel.from_pretrained(str(folder))(wave)])
    theirs = hugging_face(folder, wave)[: len(ours)]
    relative = float((ours - theirs).norm() / theirs.norm())
    cosine = float(nn.functional.cosine_similarity(ours, theirs).mean())
    print(f"\n{what}, {len(wave) / 16_000:.1f} s: true length against 30 s padding differs by "
          f"{relative:.3f} (relative), cosine {cosine:.4f}")
    return relative


def test_report_the_difference_to_padding(tiny_world: tiny.Tiny, encoder: SpeechEncoder) -> None:
    """Silence that is attended changes frames: the more silence, the more."""
    differences = [difference(tiny_world.encoder, encoder, tiny.sound(seconds, 3), "random encoder")
                   for seconds in (6.0, 24.0, 29.5)]
    assert differences == sorted(differences, reverse=True) and differences[-1] < 0.1


@pytest.mark.skipif(not ((DEMO / "config.json").is_file() and RECORDINGS.is_file()),
                    reason="needs `make models recordings`")
def test_report_the_difference_to_padding_for_real_speech() -> None:
    encoder = load_speech_encoder(str(DEMO), torch.float32)
    for record in list(read_manifest(RECORDINGS))[:3]:
        wave = decode_audio(record.audio[0])
        assert difference(DEMO, encoder, wave, "Whisper tiny.en on a recording") < 0.9


def test_other_clips_in_the_batch_do_not_matter(encoder: SpeechEncoder, mels: list[torch.Tensor]) -> None:
    together = encoder.encode(mels)
    for mel, frames in zip(mels, together, strict=True):
        (alone,) = encoder.encode([mel])
        torch.testing.assert_close(frames, alone, rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_length_does_not_matter(encoder: SpeechEncoder, mels: list[torch.Tensor]) -> None:
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    rows = [nn.functional.pad(mel, (0, 400 - mel.shape[1]), value=value)
            for mel, value in zip(mels, (0.0, 1e4, torch.nan, torch.inf, -7.0), strict=True)]
    frames, counts = encoder(torch.stack(rows), lengths)
    assert torch.equal(counts, encoder.frames_of(lengths))
    for row, mel, count in zip(frames, mels, counts, strict=True):
        torch.testing.assert_close(row[:count], encoder.encode([mel])[0], rtol=1e-5, atol=1e-5)
        assert not row[count:].any()


@pytest.mark.parametrize("samples", [1, 100, 320, 400, 479, 480, 481, 639, 640, 16_000, 16_159, 479_999])
def test_frames_of_tells_the_number_of_frames(encoder: SpeechEncoder, log_mel: LogMel, samples: int) -> None:
    mel = log_mel(tiny.sound(samples / 16_000, 0))
    assert mel.shape == (80, max(400, samples) // 160) and mel.dtype == torch.float32
    (frames,) = encoder.encode([mel])
    assert len(frames) == int(encoder.frames_of(torch.tensor(mel.shape[1])))


def test_a_longer_clip_is_refused(encoder: SpeechEncoder) -> None:
    with pytest.raises(ListenError, match=r"clip of 30\.1 s is longer than the speech encoder's window of 30 s"):
        encoder.encode([torch.zeros(80, 3010)])


def test_it_stays_frozen_and_in_eval_mode(encoder: SpeechEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_bfloat16_has_the_same_fingerprint_and_like_frames(tiny_world: tiny.Tiny, encoder: SpeechEncoder,
                                                           mels: list[torch.Tensor]) -> None:
    small = load_speech_encoder(str(tiny_world.encoder), torch.bfloat16)
    assert small.fingerprint == encoder.fingerprint
    for mel in mels[1:3]:
        fine, coarse = encoder.encode([mel])[0], small.encode([mel])[0].float()
        assert float((fine - coarse).norm() / fine.norm()) < 0.05


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "nowhere", "a/b/c", "~/nowhere/at/all"])
def test_a_missing_folder_is_named_before_any_hub_is_asked(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.llm = .*no such folder"):
        check_model_folder(path, "model.llm")


def test_what_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"model\.llm = '{tmp_path}': .*config\.json is missing"):
        check_model_folder(str(tmp_path), "model.llm")
    (tmp_path / "config.json").write_text("{}")
    for path in (str(tmp_path), "no-such-owner/no-such-model"):
        with pytest.raises(FileNotFoundError, match=rf"model\.llm = '{path}': neither a folder nor"):
            check_model_folder(path, "model.llm")
