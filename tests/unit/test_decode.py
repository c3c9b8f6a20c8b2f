"""Decoding: formats, rates and channels to float32 mono 16 kHz; bad files to one clear error."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from listen_dist.data import decode
from listen_dist.data.decode import (
    AudioError,
    UnreachableAudio,
    decode_audio,
    is_audio_name,
    join_utterances,
    probe_seconds,
    read_audio,
)


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


def formats() -> list[tuple[str, str]]:
    """All that soundfile writes into one file here (SD2 needs two)."""
    odd = {("AIFF", "DWVW_12"), ("AIFF", "DWVW_16"), ("AIFF", "DWVW_24"), ("WAV", "MPEG_LAYER_III"),
           ("MP3", "MPEG_LAYER_I"), ("MP3", "MPEG_LAYER_II")}
    return [(container, subtype) for container in soundfile.available_formats() if container not in ("RAW", "SD2")
            for subtype in soundfile.available_subtypes(container) if (container, subtype) not in odd]


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """A file of each format, whole, cut short, and with zeros and garbage in its middle."""
    wave = tone(2.0, 8_000)[:, 0] + np.random.default_rng(0).normal(0, 0.02, 16_000).astype(np.float32)
    whole = {f"{container} {subtype}": encoded(wave, 8_000, container, subtype) for container, subtype in formats()}
    for codec, suffix in (("aac", "m4a"), ("aac", "aac"), ("libopus", "webm"), ("pcm_s16le", "mov"), ("ac3", "ac3")):
        rate = 48_000 if codec == "libopus" else 16_000 if suffix != "ac3" else 32_000
        write_av(folder / f"x.{suffix}", codec, rate, 2.0)
        whole[suffix] = (folder / f"x.{suffix}").read_bytes()
    for name, content in whole.items():
        half, garbage = len(content) // 2, np.random.default_rng(1).bytes(700)
        for kind, changed in (("whole", content), ("cut", content[:half]),
                              ("zeros", content[:half] + bytes(700) + content[half + 700 :]),
                              ("garbage", content[:half] + garbage + content[half + 700 :])):
            path = folder / f"{name} {kind}"
            path.write_bytes(changed)
            yield path.name, path


def poison(patch: pytest.MonkeyPatch, value: float) -> None:
    """Fill what soundfile allocates, and much of what was freed, with a value."""
    def filled(self: soundfile.SoundFile, frames: int, always_2d: bool, dtype: str) -> np.ndarray:
        return np.full((frames, self.channels), value, dtype)

    patch.setattr(soundfile.SoundFile, "_create_empty_array", filled)
    freed = [np.full(size, value, np.float32) for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20)]
    del freed


def outcome(path: Path | bytes, value: float) -> object:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, value)
        try:
            sound = read_audio(path)
        except AudioError as error:
            return str(error).removeprefix(f"{path}: ")
        assert np.abs(sound.samples).max() <= 1
        return sound.samples.tobytes(), sound.remarks


def test_decoding_is_a_function_of_the_bytes(tmp_path: Path) -> None:
    refused = []
    for name, path in files(tmp_path):
        first, again = outcome(path, np.nan), outcome(path, 0.7)
        assert first == again, f"{name}: unlike from one time to the next"
        assert isinstance(first, tuple) or not name.endswith("whole") or "odd sample rate" in str(first), (name, first)
        refused += [name] * isinstance(first, str)
    assert len(refused) < 60, refused  # a container cut in half may be beyond use


def test_a_file_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    for container in ("WAV", "FLAC", "OGG", "MP3"):
        path = tmp_path / "a"
        path.write_bytes(encoded(tone(1.3, 44_100, 2), 44_100, container))
        assert np.array_equal(decode_audio(path), decode_audio(path.read_bytes())), container


def without_table(mp3: bytes) -> bytes:
    """An MP3 as encoders that write to a pipe leave it: its length can only be guessed by the bit rate."""
    return mp3[mp3.index(mp3[:2], max(mp3.find(b"Xing"), mp3.find(b"Info")) + 4) :]


def test_mp3_without_a_table_is_whole_and_no_longer(tmp_path: Path) -> None:
    loud = np.random.default_rng(0).normal(0, 0.2, 40_000).astype(np.float32)
    for name, wave in (("guess too long", np.concatenate([loud, np.zeros(60_000, np.float32)])),
                       ("guess too short", np.concatenate([np.zeros(60_000, np.float32), loud]))):
        file = io.BytesIO()
        soundfile.write(file, wave, 16_000, format="MP3", bitrate_mode="VARIABLE")
        path = tmp_path / "a.mp3"
        path.write_bytes(without_table(file.getvalue()))
        sound = read_audio(path)
        assert 100_000 <= len(sound.samples) < 104_000, name
        assert not sound.remarks, "nobody promised more"
        power = np.square(sound.samples[: len(sound.samples) // 25 * 25]).reshape(25, -1).mean(1)
        assert (power > 0.01).sum() == pytest.approx(10, abs=1), name


def test_what_is_shorter_than_its_header_says_is_used_and_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000).astype(np.float32)
    for container in ("MP3", "FLAC", "WAV", "AIFF", "AU"):
        whole = encoded(noise, 16_000, container)
        sound = read_audio(whole[: len(whole) // 2])
        assert 1.0 < len(sound.samples) / 16_000 < 2.1, container
        assert sound.remarks[0].startswith("shorter than its header says: "), container
        assert sound.remarks[0].endswith(" of 3.00 s"), container
        assert not read_audio(whole).remarks, container
    flipped = bytearray(encoded(noise, 16_000, "FLAC"))
    flipped[len(flipped) // 2] ^= 0x10
    sound = read_audio(bytes(flipped))
    assert len(sound.samples) == 48_000 - 4096 and sound.remarks, "the frame whose checksum is wrong is left out"
    assert np.abs(sound.samples).max() <= 0.5001
    piped = bytearray(encoded(noise, 16_000, "WAV"))
    piped[piped.index(b"data") + 4 : piped.index(b"data") + 8] = b"\xff" * 4
    assert (len(read_audio(bytes(piped)).samples), read_audio(bytes(piped)).remarks) == (48_000, ())


@pytest.mark.parametrize("filling", [bytes(3000), np.random.default_rng(1).bytes(3000)])
def test_mp3_with_a_hole_in_its_middle_goes_on_behind_it(filling: bytes, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (96_000, 1)).astype(np.float32)
    mp3 = encoded(tone(6.0, 16_000) + noise, 16_000, "MP3")
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3[:9000] + filling + mp3[12_000:])
    sound = read_audio(path)
    assert 4.0 < len(sound.samples) / 16_000 < 6.0
    assert any(remark.startswith("partly damaged: ") for remark in sound.remarks)
    spectrum = np.abs(np.fft.rfft(sound.samples[-32_000:]))
    assert spectrum.argmax() == pytest.approx(880, abs=4)


def test_channels_that_cancel_give_one_of_them() -> None:
    left = tone(1.0, 16_000)
    noise = np.random.default_rng(0).normal(0, 0.01, (16_000, 1)).astype(np.float32)
    cases = {"R = -L": [left, -left], "nearly": [left, noise - left], "with a silent one": [0 * left, left, -left]}
    for name, channels in cases.items():
        sound = read_audio(encoded(np.concatenate(channels, axis=1), 16_000, "WAV", "FLOAT"))
        assert correlation(np.abs(sound.samples), np.abs(left[:, 0])) > 0.99, name
        assert sound.remarks[0].startswith("channels cancel each other: channel "), name
    unrelated = np.random.default_rng(1).normal(0, 0.1, (16_000, 8)).astype(np.float32)
    assert not read_audio(encoded(unrelated, 16_000, "WAV", "FLOAT")).remarks


def test_floats_of_another_scale_are_scaled_and_silence_is_named() -> None:
    loud = read_audio(encoded(tone(1.0, 16_000) * 29_874, 16_000, "WAV", "FLOAT"))
    assert loud.remarks == ("scaled: floats up to 1.494e+04 where 1 is full scale",)
    assert correlation(loud.samples, tone(1.0, 16_000)[:, 0]) > 0.9999
    assert not read_audio(encoded(tone(1.0, 16_000) * 2.4, 16_000, "WAV", "FLOAT")).remarks, "an overshoot is clipped"
    for silence in (np.zeros(16_000, np.float32), np.full(16_000, 1e-6, np.float32)):
        assert read_audio(encoded(silence, 16_000, "WAV", "FLOAT")).remarks == ("digital silence",)


def test_samples_are_those_of_the_shard(tmp_path: Path) -> None:
    quiet = encoded(tone(1.0, 44_100) * 1e-3, 44_100, "WAV", "FLOAT")
    wave = decode_audio(quiet)
    assert np.array_equal(wave, decode.as_stored(wave))
    assert np.array_equal(wave, decode_audio(encoded(decode.to_pcm16(wave), 16_000, "FLAC")))


def test_a_wav_named_g722_is_a_wav(tmp_path: Path) -> None:
    for container in ("WAV", "FLAC", "OGG"):
        (tmp_path / "a.g722").write_bytes(encoded(tone(1.0, 16_000), 16_000, container))
        assert correlation(decode_audio(tmp_path / "a.g722"), tone(1.0, 16_000)[:, 0]) > 0.99
        assert probe_seconds(tmp_path / "a.g722") == pytest.approx(1.0)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(encoded(tone(1.0, 16_000), 16_000, "WAV"))
    playlists = {"a.ffconcat": "ffconcat version 1.0\nfile 'secret.wav'\n",
                 "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"}
    for name, content in playlists.items():
        for file in (tmp_path / name, tmp_path / "plain"):
            file.write_text(content)
            with pytest.raises(AudioError, match="can't be decoded"):
                decode_audio(file)


def test_what_the_system_refuses_is_no_fault_of_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(1.0, 16_000), 16_000, "WAV"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnreachableAudio, match=f"^{path}: can't be read: Permission denied"):
        decode_audio(path)
    monkeypatch.undo()
    with pytest.raises(AudioError, match="a folder, not a file") as found:
        decode_audio(tmp_path)
    assert not isinstance(found.value, UnreachableAudio)


def test_names_taken_for_audio() -> None:
    assert all(map(is_audio_name, ("a.wav", "a.SPH", "a.caf", "a.mov", "b.c.opus")))
    assert not any(map(is_audio_name, ("._a.wav", "a.txt", "a.json", "wav")))


def bad_inputs() -> dict[str, tuple[bytes, str]]:
    good = encoded(np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, "FLAC", "PCM_16")
    nan = tone(1.0, 16_000)
    nan[100] = np.nan
    long = encoded(np.zeros(31 * 16_000, np.float32), 16_000, "FLAC")
    return {
        "no bytes": (b"", "empty file"),
        "text": (b"hello world " * 100, "can't be decoded"),
        "flac header only": (good[:50], "damaged|can't be decoded|holds"),
        "no samples": (encoded(np.zeros(0, np.float32), 16_000, "WAV"), "holds 0 samples"),
        "one sample": (encoded(np.zeros(1, np.float32), 16_000, "WAV"), "holds 1 samples"),
        "NaN": (encoded(nan, 16_000, "WAV", "FLOAT"), "not finite"),
        "a sample too long": (encoded(np.zeros(30 * 16_000 + 1, np.float32), 16_000, "WAV"),
                              "30.0001 s long by its header; the limit is 30 s"),
        "playlist": (b"#EXTM3U\n#EXTINF:2,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "can't be decoded"),
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
    with pytest.raises(UnreachableAudio, match="^/nowhere/a.wav: no such file"):
        decode_audio("/nowhere/a.wav")


def test_join_has_a_tenth_of_a_second_of_silence() -> None:
    a, b = np.ones(100, np.float32), np.full(50, 2, np.float32)
    joined = join_utterances(a, b)
    assert joined.dtype == np.float32
    assert (joined == np.concatenate([a, np.zeros(1600), b])).all()


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1", "hexadecagonal"])
def test_channels_that_pyav_reads_are_averaged(layout: str) -> None:
    channels = len(av.AudioLayout(layout).channels)
    samples = (8000 * np.random.default_rng(0).uniform(-1, 1, (4000, channels))).astype(np.int16)  # [S, C]
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = 16_000
        for part in (frame, None):
            container.mux(stream.encode(part))
    np.testing.assert_allclose(decode_audio(file.getvalue()), samples.mean(axis=1) / 32768, atol=1.1 / 65536)


@pytest.mark.parametrize("content", [encoded(tone(0.2, 8000, channels=2), 8000, "WAV"), b"", b"no audio"])
def test_a_pipe_is_read_like_its_bytes_and_named(content: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    try:
        expected = read_audio(content).samples
    except AudioError as error:
        with pytest.raises(AudioError, match=f"^/dev/fd/{reading}: {re.escape(str(error))}$"):
            read_audio(f"/dev/fd/{reading}")
    else:
        assert np.array_equal(read_audio(f"/dev/fd/{reading}").samples, expected)
    finally:
        os.close(reading)


def test_an_address_is_no_file() -> None:
    with pytest.raises(AudioError, match=r"^https://host/a\.wav: an address, not a file; download it first$"):
        read_audio("https://host/a.wav")
