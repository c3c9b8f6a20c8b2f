"""Audio files of every format that soundfile and PyAV can write, of odd rates, lengths and values."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import av
import numpy as np
import soundfile

RATES = (
    8000,
    11025,
    16000,
    16000,
    22050,
    44100,
    48000,
    48000,
    96000,
    192000,
    1,
    7,
    100,
    15999,
    16001,
    384000,
    655350,
    2**31 - 1,
)
CHANNELS = (1, 1, 1, 2, 2, 2, 3, 6, 8, 64, 65, 255)
LENGTHS = (0, 1, 2, 100, 319, 320, 321, 1000, 16000)
MOST_VALUES = 1_500_000
AV_FORMATS = (
    ("mp4", "aac", 44100, "m4a"),
    ("webm", "libopus", 48000, "webm"),
    ("ogg", "libopus", 48000, "opus"),
    ("mp3", "libmp3lame", 44100, "mp3"),
    ("amr", "libopencore_amrnb", 8000, "amr"),
    ("g722", "g722", 16000, "g722"),
    ("mov", "alac", 44100, "mov"),
    ("ac3", "ac3", 48000, "ac3"),
    ("adts", "aac", 16000, "aac"),
    ("caf", "pcm_s16le", 16000, "caf"),
    ("tta", "tta", 44100, "tta"),
    ("wv", "wavpack", 44100, "wv"),
    ("flac", "flac", 44100, "flac"),
    ("avi", "mp2", 44100, "avi"),
    ("mpegts", "aac", 44100, "ts"),
    ("flv", "aac", 44100, "flv"),
    ("wav", "adpcm_ima_wav", 16000, "wav"),
    ("wav", "g722", 16000, "wav"),
    ("wav", "pcm_f32le", 16000, "wav"),
    ("nut", "pcm_f32le", 16000, "nut"),
    ("au", "pcm_mulaw", 8000, "au"),
    ("rm", "ra_144", 8000, "ra"),
    ("3gp", "aac", 16000, "3gp"),
    ("eac3", "eac3", 48000, "eac3"),
    ("sox", "pcm_s32le", 16000, "sox"),
    ("mp2", "mp2", 44100, "mp2"),
    ("spdif", "ac3", 48000, "spdif"),
    ("w64", "pcm_s16le", 16000, "w64"),
    ("matroska", "pcm_f64le", 16000, "mka"),
)
"""Container, codec, rate, suffix."""


@dataclass(frozen=True)
class Sound:
    """An encoded sound."""

    content: bytes
    suffix: str
    plain: bool
    """Whether it is a usual sound in a usual form, which must be used."""


def sound(chance: random.Random) -> Sound:
    """A sound of some format, unharmed."""
    plain = chance.random() < 0.25
    for _ in range(50):
        made = _by_av(chance) if chance.random() < 0.3 else _by_soundfile(chance, plain)
        if made is not None:
            return made
    raise AssertionError("nothing can be written")


def wave(chance: random.Random, length: int, channels: int) -> np.ndarray:
    """float64 [S, C]: noise, tones, silence, channels that cancel, values out of range or not finite."""
    random_numbers = np.random.default_rng(chance.getrandbits(32))
    kind = chance.choice(
        ("noise",) * 4
        + ("tone", "silence", "cancel", "huge", "int16", "nan", "inf", "tiny", "dc", "full", "one", "over")
    )
    noise = random_numbers.uniform(-0.3, 0.3, (length, channels))
    if kind == "tone":
        return 0.3 * np.sin(0.05 * np.arange(length))[:, None] * np.ones(channels)
    if kind == "silence":
        return np.zeros_like(noise)
    if kind == "cancel":
        return noise[:, :1] * np.where(np.arange(channels) % 2, -1.0, 1.0)
    if kind in ("nan", "inf", "one") and length:
        noise[chance.randrange(length), chance.randrange(channels)] = {"nan": np.nan, "inf": np.inf, "one": 1e38}[kind]
        return noise
    scale = {"huge": 1e38, "int16": 40_000.0, "tiny": 1e-40, "over": 5.0}.get(kind, 1.0)
    return {"dc": np.full_like(noise, 0.5), "full": np.sign(noise)}.get(kind, noise * scale)


def _by_soundfile(chance: random.Random, plain: bool) -> Sound | None:
    format_name = chance.choice(("WAV", "WAV", "FLAC", "OGG", "MP3")) if plain else chance.choice(_FORMATS)
    subtype = chance.choice(_SUBTYPES[format_name])
    rate, channels, length = chance.choice(RATES), chance.choice(CHANNELS), chance.choice(LENGTHS)
    if plain:
        subtype = soundfile.default_subtype(format_name)
        rate, channels, length = (
            chance.choice((16000, 44100, 48000)),
            chance.choice((1, 2)),
            chance.randrange(3000, 60000),
        )
    elif chance.random() < 0.5:
        length = chance.randrange(1, max(2, min(4 * rate, MOST_VALUES // channels)))
    samples = (
        np.random.default_rng(length).uniform(-0.3, 0.3, (length, channels))
        if plain
        else wave(chance, length, channels)
    )
    if format_name in ("OGG", "MP3"):  # their encoders crash on what is not finite or huge
        samples = np.nan_to_num(samples).clip(-10, 10)
    file = io.BytesIO()
    try:
        with np.errstate(all="ignore"):
            soundfile.write(file, samples, rate, format=format_name, subtype=subtype)
    except (soundfile.LibsndfileError, ValueError, TypeError, AssertionError):
        return None
    return Sound(file.getvalue(), "wav" if format_name in ("WAVEX", "RF64", "NIST") else format_name.lower(), plain)


def _by_av(chance: random.Random) -> Sound | None:
    container, codec, rate, suffix = chance.choice(AV_FORMATS)
    layout = "mono" if codec in ("libopencore_amrnb", "g722", "ra_144") else chance.choice(("mono", "stereo"))
    channels = 1 if layout == "mono" else 2
    length = chance.choice((1, 100, 1000, chance.randrange(1, 3 * rate)))
    samples = np.nan_to_num(wave(chance, length, channels), posinf=1.0).clip(-1, 1).astype(np.float32)
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=container) as out:
            stream = out.add_stream(codec, rate=rate)
            stream.layout = layout
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
            frame.sample_rate = rate
            for part in (frame, None):
                out.mux(stream.encode(part))
    except (av.error.FFmpegError, ValueError, OSError):
        return None
    return Sound(file.getvalue(), suffix, plain=False) if file.getvalue() else None


# Sound Designer II keeps its header in a second file, `._` in the working directory where the first has no name.
_FORMATS = [name for name in soundfile.available_formats() if name not in ("RAW", "SD2")]
_SUBTYPES = {
    name: [subtype for subtype in soundfile.available_subtypes(name) if soundfile.check_format(name, subtype)]
    for name in _FORMATS
}
