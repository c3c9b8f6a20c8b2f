"""Decode audio of any common format to what the model hears: float32, mono, 16 kHz.

soundfile reads wav, flac, ogg and mp3; PyAV (FFmpeg's libraries) reads the rest and raw G.722.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torchaudio.functional

from listen_dist.errors import ListenError
from listen_dist.structures import SAMPLE_RATE

MIN_SECONDS = 0.02
"""One encoder frame; less is not a sound one could say anything about."""
MAX_CHANNELS = 64
JOIN_SILENCE_SECONDS = 0.1

# The resampling kernel has about (rate / gcd) * (16,000 / gcd) taps: 44.1 kHz needs 70,560, 96 kHz 6,
# while a rate without common factors would need gigabytes.
_MAX_RESAMPLING_TAPS = 1 << 24
_BLOCK_FRAMES = 1 << 20
_UNKNOWN_FRAMES = 1 << 62
"""libsndfile's length of a FLAC that was written to a pipe; it can't read such a one."""


class AudioError(ListenError):
    """An audio file or member that can't be used; the message says why."""


def decode_audio(source: bytes | str | os.PathLike[str], max_seconds: float = 30.0) -> np.ndarray:
    """Decode a file (by path) or its bytes to float32 [S] at 16 kHz, channels averaged.

    Raises:
        AudioError: not readable as audio, empty, not finite, longer than `max_seconds` or absurd;
            for a path the message starts with it.
    """
    try:
        samples, rate = _decode_any(source, max_seconds)
        return _to_model_audio(samples, rate, max_seconds)
    except AudioError as error:
        name = "" if isinstance(source, bytes) else f"{os.fspath(source)}: "
        raise AudioError(f"{name}{error}") from None


def join_utterances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two waveforms [S1], [S2] at 16 kHz with 0.1 s of silence between them; float32 [S]."""
    silence = np.zeros(round(JOIN_SILENCE_SECONDS * SAMPLE_RATE), dtype=np.float32)
    return np.concatenate([first, silence, second]).astype(np.float32, copy=False)


def probe_seconds(path: str | os.PathLike[str]) -> float | None:
    """Return the length in seconds as the file's header tells it, or None where that takes decoding."""
    if Path(path).suffix == ".g722":
        return os.path.getsize(path) / 8000  # 64 kbit/s, no header
    try:
        return float(soundfile.info(os.fspath(path)).duration)
    except (soundfile.LibsndfileError, OSError, ValueError):
        return None


def _decode_any(source: bytes | str | os.PathLike[str], max_seconds: float) -> tuple[np.ndarray, int]:
    """Return float32 [S], channels averaged, and the rate in Hz."""
    if not isinstance(source, bytes):
        source = Path(source)
        if not source.is_file():
            raise AudioError("no such file")
        if source.suffix == ".g722":
            return _decode_av(source, max_seconds, "g722")
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        raise AudioError("empty file (0 bytes)")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
    except soundfile.LibsndfileError:
        return _decode_av(source, max_seconds, None)
    with file:
        if file.frames >= _UNKNOWN_FRAMES:
            return _decode_av(source, max_seconds, None)
        return _read_soundfile(file, max_seconds)


def _read_soundfile(file: soundfile.SoundFile, max_seconds: float) -> tuple[np.ndarray, int]:
    rate = int(file.samplerate)
    _check_format(rate, int(file.channels))
    # One sample more than allowed tells "too long" apart; a header's claim is never trusted with memory.
    limit = math.ceil(max_seconds * rate) + 1
    if file.frames > limit:
        raise AudioError(f"{file.frames / rate:.1f} s long by its header; the limit is {max_seconds:g} s")
    expected = max(int(file.frames), 0)
    blocks: list[np.ndarray] = []
    try:
        for block in file.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True):
            blocks.append(_average(block.T))
    except soundfile.LibsndfileError as error:
        raise AudioError(f"damaged: {error.error_string}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(samples) < expected:
        raise AudioError(f"damaged: {len(samples)} of {expected} samples could be read")
    return samples, rate


def _decode_av(
    source: bytes | Path, max_seconds: float, container_format: str | None
) -> tuple[np.ndarray, int]:
    file_or_name = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    blocks: list[np.ndarray] = []
    length = 0
    try:
        with av.open(file_or_name, mode="r", format=container_format) as container:
            if not container.streams.audio:
                raise AudioError("holds no audio stream")
            stream = container.streams.audio[0]
            rate = int(stream.rate)
            _check_format(rate, int(stream.channels))
            to_float = av.AudioResampler(format="fltp")  # keeps rate and channels
            for frame in container.decode(stream):
                for converted in to_float.resample(frame):
                    blocks.append(_average(converted.to_ndarray()))
                    length += len(blocks[-1])
                if length > max_seconds * rate:
                    raise AudioError(f"longer than the limit of {max_seconds:g} s")
    except (av.error.FFmpegError, OSError) as error:
        raise AudioError(f"can't be decoded: {error.strerror or error}") from None
    if not blocks:
        raise AudioError("holds no samples")
    return np.concatenate(blocks), rate


def _average(block: np.ndarray) -> np.ndarray:
    """Channels [C, S] to one [S]. Block by block, so that many channels never lie in memory at full length."""
    return block[0].copy() if len(block) == 1 else block.mean(axis=0, dtype=np.float32)


def _check_format(rate: int, channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels; expected 1 to {MAX_CHANNELS}")
    if rate < 1:
        raise AudioError(f"sample rate {rate} Hz")
    divisor = math.gcd(rate, SAMPLE_RATE)
    if (rate // divisor) * (SAMPLE_RATE // divisor) > _MAX_RESAMPLING_TAPS:
        raise AudioError(f"odd sample rate {rate} Hz; resample it first, to 16 kHz for instance")


def _to_model_audio(mono: np.ndarray, rate: int, max_seconds: float) -> np.ndarray:
    """Check and resample float32 [S'] at `rate` Hz; float32 [S]."""
    seconds = len(mono) / rate
    if seconds > max_seconds:
        raise AudioError(f"longer than the limit of {max_seconds:g} s")
    if seconds < MIN_SECONDS:
        raise AudioError(f"holds {len(mono)} samples, less than {MIN_SECONDS} s")
    # Extremes pass NaN and infinities on, and make no array of the clip's length.
    if not (np.isfinite(mono.min()) and np.isfinite(mono.max())):
        raise AudioError("holds values that are not finite (NaN or infinity)")
    if rate != SAMPLE_RATE:
        mono = torchaudio.functional.resample(torch.from_numpy(mono), rate, SAMPLE_RATE).numpy()
    return np.ascontiguousarray(mono, dtype=np.float32)
