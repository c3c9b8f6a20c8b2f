"""Augmentation: what was asked for, the same bits wherever a sample is read, and nothing at all when off."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from listen_dist.data.augment import Augmenter, SoundShards, add_noise, open_sounds, read_stretch, reverberate
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import SampleRef
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.errors import ListenError
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import AugmentConfig, ConfigError, DataConfig
from tests import tiny

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

RATE = 16_000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noises at two rates and a folder of impulse responses."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "noise/deeper").mkdir(parents=True)
    (folder / "rooms").mkdir()
    random = np.random.default_rng(0)
    soundfile.write(folder / "noise/a.wav", random.uniform(-0.5, 0.5, 8_000), RATE)
    soundfile.write(folder / "noise/deeper/b.flac", random.uniform(-0.5, 0.5, (44_100, 2)), 44_100)
    decay = random.standard_normal(4_000) * np.exp(-np.arange(4_000) / 600)
    soundfile.write(folder / "rooms/r.wav", 0.2 * decay / abs(decay).max(), RATE)
    return folder


def everything(sounds: Path) -> AugmentConfig:
    return AugmentConfig(speed=0.1, gain_db=6, noise=str(sounds / "noise"), reverb=str(sounds / "rooms"),
                         time_masks=2, mel_masks=2)


def augmented(config: AugmentConfig, wave: np.ndarray, name: str = "x", epoch: int = 0, seed: int = 0) -> np.ndarray:
    augmenter = Augmenter(config, seed, 30.0)
    return augmenter.waveform(wave, augmenter.generator(name, epoch))


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_noise_is_added_at_the_ratio_asked_for(snr: float) -> None:
    wave, noise = tiny.sound(1.0, 1), np.random.default_rng(1).uniform(-2, 2, RATE).astype(np.float32)
    added = add_noise(wave, noise, snr) - wave
    assert added.dtype == np.float32
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(snr, abs=1e-3)
    assert np.corrcoef(added, noise)[0, 1] > 0.9999
    silence = np.zeros(RATE, np.float32)
    assert np.array_equal(add_noise(silence, noise, snr), silence)
    assert np.array_equal(add_noise(wave, silence, snr), wave)


def test_drawn_ratios_lie_within_the_limits(sounds: Path) -> None:
    config = AugmentConfig(noise=str(sounds / "noise"), noise_snr_db=[3.0, 9.0])
    wave = tiny.sound(1.3, 2)  # longer than the short noise, which is repeated
    ratios = []
    for epoch in range(20):
        added = augmented(config, wave, epoch=epoch) - wave
        ratios.append(10 * np.log10(np.mean(wave**2) / np.mean(added**2)))
    assert min(ratios) >= 3 - 1e-3 and max(ratios) <= 9 + 1e-3 and max(ratios) - min(ratios) > 2


def test_a_stretch_of_another_rate_is_as_long_as_asked(sounds: Path) -> None:
    for name in ("noise/a.wav", "noise/deeper/b.flac"):
        for length in (400, 7_777, 40_000):
            stretch = read_stretch(str(sounds / name), length, np.random.default_rng(length))
            assert stretch.shape == (length,) and stretch.dtype == np.float32 and stretch.std() > 0.05


def test_speed_moves_length_and_pitch_together() -> None:
    time = np.arange(2 * RATE) / RATE
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    ratios = set()
    for epoch in range(30):
        changed = augmented(AugmentConfig(speed=0.1), tone, epoch=epoch)
        factor = len(tone) / len(changed)
        peak = np.argmax(abs(np.fft.rfft(changed * np.hanning(len(changed))))) * RATE / len(changed)
        assert peak == pytest.approx(1000 * factor, abs=1.0)
        assert 0.899 < factor < 1.101 and round(factor, 2) == pytest.approx(factor, abs=2e-4)
        ratios.add(round(factor, 2))
    assert len(ratios) > 8
    long = np.zeros(29 * RATE, np.float32)  # never beyond the encoder's window
    assert max(len(augmented(AugmentConfig(speed=0.5), long, epoch=epoch)) for epoch in range(20)) <= 30 * RATE


def test_gain_is_within_its_limits() -> None:
    wave = tiny.sound(0.5, 3)
    gains = [20 * np.log10(float((augmented(AugmentConfig(gain_db=6), wave, epoch=e) / wave).mean()))
             for e in range(20)]
    assert -6 <= min(gains) < -2 and 2 < max(gains) <= 6


def test_reverberation_is_a_convolution_as_loud_as_before() -> None:
    wave = tiny.sound(0.5, 4)
    impulse = np.zeros(300, np.float32)
    impulse[40] = 0.25  # the direct sound alone changes nothing
    np.testing.assert_allclose(reverberate(wave, impulse), wave, atol=2e-6)
    impulse[140] = -0.125
    expected = wave + np.concatenate([np.zeros(100, np.float32), -0.5 * wave[:-100]])
    expected *= np.sqrt(np.mean(wave**2) / np.mean(expected**2))
    np.testing.assert_allclose(reverberate(wave, impulse), expected, atol=2e-6)


def test_masks_are_bands_and_stretches_of_the_mean() -> None:
    log_mel = torch.randn(80, 300, generator=torch.Generator().manual_seed(0))
    before = log_mel.clone()
    widths = []
    for epoch in range(30):
        augmenter = Augmenter(AugmentConfig(time_masks=1, time_mask_seconds=0.4, mel_masks=1, mel_mask_bins=9), 0, 30)
        out = augmenter.log_mel(log_mel, augmenter.generator("x", epoch))
        masked = out == log_mel.mean()
        columns, rows = masked.all(0).nonzero().flatten(), masked.all(1).nonzero().flatten()
        for stretch, limit in ((columns, 40), (rows, 9)):
            assert len(stretch) <= limit
            if len(stretch):
                assert int(stretch[-1] - stretch[0]) + 1 == len(stretch)
        masked[:, columns], masked[rows] = False, False
        assert not masked.any() and torch.equal(log_mel, before)
        widths.append((len(columns), len(rows)))
    assert max(c for c, _ in widths) > 20 and max(r for _, r in widths) > 5


def reader_of(world: tiny.Tiny, augmenter: Augmenter | None) -> BatchReader:
    config = world.config()
    return BatchReader([ShardIndex.load(world.speech)], LogMel.from_pretrained(config.model.speech_encoder),
                       TextEncoder(load_tokenizer(config.model.llm), config.model), config.data, True, augmenter)


def test_the_same_sample_gets_the_same_bits_in_any_batch_and_process(tiny_world: tiny.Tiny, sounds: Path) -> None:
    refs = [SampleRef(0, 0, row) for row in range(4)]
    reader = reader_of(tiny_world, Augmenter(everything(sounds), 5, 30.0))
    together = reader[refs]
    elsewhere = pickle.loads(pickle.dumps(reader_of(tiny_world, Augmenter(everything(sounds), 5, 30.0))))
    for row, ref in reversed(list(enumerate(refs))):  # another order, as another rank or worker would have it
        alone = elsewhere[[ref]]
        frames = int(together.audio_lengths[row])
        assert int(alone.audio_lengths[0]) == frames and alone.seconds == [together.seconds[row]]
        assert torch.equal(alone.audio[0], together.audio[row, :, :frames])
    later = reader[[dataclasses.replace(ref, epoch=1) for ref in refs]]
    assert later.ids == together.ids and later.seconds != together.seconds
    other_seed = reader_of(tiny_world, Augmenter(everything(sounds), 6, 30.0))[refs]
    assert other_seed.seconds != together.seconds


def test_off_means_the_same_bits(tiny_world: tiny.Tiny) -> None:
    refs = [SampleRef(0, 0, row) for row in range(4)]
    assert AugmentConfig().active == []
    off, none = (reader_of(tiny_world, a)[refs] for a in (Augmenter(AugmentConfig(), 0, 30.0), None))
    assert torch.equal(off.audio, none.audio) and off.seconds == none.seconds


@pytest.mark.parametrize("samples", [1, 399, 400, 5_001, 48_000])
def test_log_mel_is_that_of_the_library(tiny_world: tiny.Tiny, samples: int) -> None:
    extractor = WhisperFeatureExtractor.from_pretrained(str(tiny_world.encoder))
    wave = tiny.sound(3.0, 5)[:samples]
    padded = np.pad(wave, (0, max(0, 400 - samples)))
    expected = extractor(padded, sampling_rate=RATE, padding=False, truncation=False, return_tensors="np")
    np.testing.assert_allclose(LogMel(extractor)(wave).numpy(), expected["input_features"][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("words", "message"), [
    (["data.augment.speed=0.1", "data.augment.mel_masks=1"],
     r"data\.augment\.speed = 0\.1: .*set data\.stored_features=false"),
    (["data.augment.speed=0.7", "data.stored_features=false"], r"data\.augment\.speed = 0\.7: must be within"),
    (["data.augment.noise_snr_db=[20,5]"], r"data\.augment\.noise_snr_db .*\[lowest, highest\]"),
    (["data.temperature=0"], r"data\.temperature = 0.* must be positive"),
    (["data.test.0.max_seconds=3"], r"data\.test\[0\]\.max_seconds .*only training leaves samples out"),
])
def test_what_makes_no_sense_is_refused(tiny_world: tiny.Tiny, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_world.config(*words)


def test_noise_and_rooms_may_come_in_shards(sounds: Path, tmp_path: Path) -> None:
    lengths = [0.3, 2.0, 0.5, 1.1]
    index = tiny.write_set(tmp_path / "set", tiny.sound_records(4), per_shard=3, seconds=lengths)
    noises = open_sounds("data.augment.noise", str(tmp_path / "set"), DataConfig())
    assert isinstance(noises, SoundShards) and len(noises) == 4
    waves = [index.read_sample(shard, row).waveform for shard, row in ((0, 0), (0, 1), (0, 2), (1, 0))]
    random, seen = np.random.default_rng(0), set()
    for _ in range(60):
        drawn = noises.whole(random, 5.0)
        seen |= {i for i, wave in enumerate(waves) if np.array_equal(wave, drawn)}
    assert seen == {0, 1, 2, 3}
    for _ in range(20):  # a stretch lies in one of the sounds; a short one is repeated
        drawn = noises.stretch(8_000, random)
        assert drawn.shape == (8_000,) and drawn.dtype == np.float32
        assert any(np.array_equal(drawn[: len(wave)], wave) if len(wave) < 8_000 else
                   drawn.tobytes() in wave.tobytes() for wave in waves if wave is not None)
    wave = tiny.sound(1.0, 1)
    both = AugmentConfig(noise=str(tmp_path / "set"), reverb=str(tmp_path / "set"))
    assert not np.array_equal(augmented(both, wave), wave)
    assert np.array_equal(augmented(both, wave), augmented(both, wave))
    assert not np.array_equal(augmented(both, wave), augmented(both, wave, epoch=1))
    with pytest.raises(ShardError, match=r"nowhere/index\.json: no such index"):
        open_sounds("data.augment.noise", f"{{{tmp_path}/nowhere,{tmp_path}/set}}", DataConfig())


def test_folders_without_audio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.noise = .*holds no audio file"):
        Augmenter(AugmentConfig(noise=str(tmp_path)), 0, 30.0)
    (tmp_path / "a.wav").write_bytes(b"no audio")
    with pytest.raises(ConfigError, match=r"data\.augment\.reverb: .*a\.wav: can.t be decoded"):
        Augmenter(AugmentConfig(reverb=str(tmp_path)), 0, 30.0)


def test_noises_of_any_format_and_bad_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000)
    soundfile.write(tmp_path / "a.wav", noise[::2], 8_000, subtype="GSM610")
    soundfile.write(tmp_path / "b.wav", np.stack([noise, -noise], 1), RATE)
    soundfile.write(tmp_path / "c.mp3", noise, RATE)
    soundfile.write(tmp_path / "d.wav", noise, 16_001)
    (tmp_path / "._a.wav").write_bytes(b"no audio")
    files = open_sounds("data.augment.noise", str(tmp_path), DataConfig())
    assert len(files) == 4
    for name in "ab":
        stretch = read_stretch(str(tmp_path / f"{name}.wav"), 4_000, np.random.default_rng(0))
        assert stretch.shape == (4_000,) and stretch.std() > 0.05, name
    random = np.random.default_rng(1)
    assert all(files.stretch(2_000, random).std() > 0.05 for _ in range(20))
    assert "d.wav: odd sample rate 16001 Hz" in caplog.text
    for path in tmp_path.glob("[a-c].*"):
        path.unlink()
    with pytest.raises(ListenError, match="10 sounds in a row can't be used for augmentation, the last because"):
        files.stretch(2_000, random)
