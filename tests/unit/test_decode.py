"""Decoding: formats, rates and channels to float32 mono 16 kHz; bad files to one clear error."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from listen_dist.data.decode import AudioError, decode_audio, join_utterances, probe_seconds


def tone(seconds: float, rate: int, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """float32 [S, channels]"""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, container: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def write_av(path: Path, codec: str, rate: int, seconds: float, container: str | None = None) -> None:
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        samples = (tone(seconds, rate)[:, 0] * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    size = min(len(a), len(b))
    return float(np.corrcoef(a[:size], b[:size])[0, 1])


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1), (48_000, 2)])
def test_formats_rates_and_channels(container: str, rate: int, channels: int) -> None:
    wave = decode_audio(encoded(tone(1.0, rate, channels), rate, container))
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert abs(len(wave) - 16_000) <= (1_600 if container == "MP3" else 1)
    if container != "MP3":  # mp3 shifts by its encoder's delay
        assert correlation(wave, tone(1.0, 16_000)[:, 0]) > 0.999


def test_96_khz_with_8_channels_is_averaged() -> None:
    samples = tone(0.5, 96_000, 8)
    samples[:, 1::2] *= -0.5  # the mean of 1 and -0.5
    wave = decode_audio(encoded(samples, 96_000, "WAV", "FLOAT"))
    assert len(wave) == 8_000
    assert np.abs(wave).max() == pytest.approx(0.125, rel=0.05)


def test_16_bit_flac_is_exact() -> None:
    ints = np.random.default_rng(0).integers(-32768, 32768, 16_000).astype(np.int16)
    wave = decode_audio(encoded(ints, 16_000, "FLAC", "PCM_16"))
    assert (wave * 32768 == ints).all()


def test_raw_g722_and_a_container_of_ffmpeg(tmp_path: Path) -> None:
    write_av(tmp_path / "a.g722", "g722", 16_000, 1.0, "g722")
    wave = decode_audio(tmp_path / "a.g722")
    assert abs(len(wave) - 16_000) <= 64
    assert probe_seconds(tmp_path / "a.g722") == pytest.approx(len(wave) / 16_000)
    spectrum = np.abs(np.fft.rfft(wave[:16_000]))
    assert spectrum.argmax() == pytest.approx(440, abs=2)
    write_av(tmp_path / "b.mka", "pcm_s16le", 22_050, 1.0, "matroska")
    assert len(decode_audio(str(tmp_path / "b.mka"))) == 16_000


def test_flac_of_unknown_length_as_a_pipe_leaves_it() -> None:
    ints = np.random.default_rng(0).integers(-9000, 9000, 16_000).astype(np.int16)
    content = bytearray(encoded(ints, 16_000, "FLAC", "PCM_16"))
    content[21] &= 0xF0  # the 36 bits of the length
    content[22:26] = bytes(4)
    assert (decode_audio(bytes(content)) * 32768 == ints).all()
    with pytest.raises(AudioError, match=r"longer than the limit of 0\.5 s"):
        decode_audio(bytes(content), max_seconds=0.5)


def bad_inputs() -> dict[str, tuple[bytes, str]]:
    good = encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, "FLAC", "PCM_16")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    nan = tone(1.0, 16_000)
    nan[100] = np.nan
    long = encoded(np.zeros(31 * 16_000, np.float32), 16_000, "FLAC")
    return {
        "no bytes": (b"", "empty file"),
        "text": (b"hello world " * 100, "can't be decoded"),
        "flac header only": (good[:50], "damaged|can't be decoded|holds"),
        "flac cut short": (good[: len(good) // 2], "damaged"),
        "flac with a flipped bit": (bytes(flipped), "damaged"),
        "no samples": (encoded(np.zeros(0, np.float32), 16_000, "WAV"), "holds 0 samples"),
        "one sample": (encoded(np.zeros(1, np.float32), 16_000, "WAV"), "holds 1 samples"),
        "NaN": (encoded(nan, 16_000, "WAV", "FLOAT"), "not finite"),
        "31 s": (long, "31.0 s long by its header; the limit is 30 s"),
        "odd rate": (encoded(tone(1.0, 16_000), 44_101, "WAV"), "odd sample rate 44101 Hz"),
        "pickle": (b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", "can't be decoded"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_audio_is_an_audio_error(name: str, tmp_path: Path) -> None:
    content, message = bad_inputs()[name]
    with pytest.raises(AudioError, match=message):
        decode_audio(content)
    path = tmp_path / "bad.audio"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=f"^{path}: "):
        decode_audio(path)


def test_wav_that_claims_three_hours_reserves_no_memory() -> None:
    short = bytearray(encoded(tone(0.1, 16_000), 16_000, "WAV"))
    place = short.index(b"data") + 4
    short[place : place + 4] = (3 * 3600 * 16_000 * 2).to_bytes(4, "little")
    try:
        assert len(decode_audio(bytes(short))) <= 1_600  # libsndfile takes what is there
    except AudioError:
        pass


def test_long_audio_in_an_ffmpeg_container_stops_early(tmp_path: Path) -> None:
    write_av(tmp_path / "long.g722", "g722", 16_000, 40.0, "g722")
    with pytest.raises(AudioError, match="longer than the limit of 30 s"):
        decode_audio(tmp_path / "long.g722")
    assert len(decode_audio(tmp_path / "long.g722", max_seconds=60)) > 30 * 16_000


def test_missing_file() -> None:
    with pytest.raises(AudioError, match="^/nowhere/a.wav: no such file"):
        decode_audio("/nowhere/a.wav")


def test_join_has_a_tenth_of_a_second_of_silence() -> None:
    a, b = np.ones(100, np.float32), np.full(50, 2, np.float32)
    joined = join_utterances(a, b)
    assert joined.dtype == np.float32
    assert (joined == np.concatenate([a, np.zeros(1600), b])).all()
