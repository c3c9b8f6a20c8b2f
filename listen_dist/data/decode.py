"""Decode audio of any common format to what the model hears: float32, mono, 16 kHz, as 16 bits hold it.

soundfile reads what tells its length exactly (wav, flac, ogg and their like), PyAV (FFmpeg's libraries) the rest:
MP3, raw G.722, whatever libsndfile doesn't know or fails in. What comes out is a function of the file's bytes.

Samples are rounded to 16 bits, as shards hold them, so that a file, its shard and its stored frames say the same.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

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
AUDIO_SUFFIXES = frozenset((
    ".3gp", ".aac", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".flac", ".g722", ".gsm", ".m4a", ".mka",
    ".mov", ".mp2", ".mp3", ".mp4", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".spx", ".tta", ".voc", ".w64",
    ".wav", ".webm", ".wma", ".wv", ".xi"))
"""What is taken for audio in a folder. A file that is named itself may have any name."""

# The resampling kernel has about (rate / gcd) * (16,000 / gcd) taps: 44.1 kHz needs 70,560, 96 kHz 6,
# while a rate without common factors would need gigabytes.
_MAX_RESAMPLING_TAPS = 1 << 24
_BLOCK_VALUES = 1 << 20
"""Samples of all channels that are read at a time."""
_PIPE_BYTES = 1 << 28
"""A pipe must be held in memory whole."""
_UNKNOWN_FRAMES = 1 << 62
"""libsndfile's length of a FLAC that was written to a pipe; it can't read such a one."""
_SHORTER_SECONDS = 0.1
"""A file is called shorter than its header says from here on; less is an encoder's padding."""
_OVERSHOOT = 2.0
"""Files of floats leave the range of -1 to 1 a little; those beyond this were written in another scale."""
_CANCELLED = 0.2
"""Channels cancel where their mean has less than this share of the power that unrelated channels would leave."""
_CUT_SHORT = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
_PIPED_BYTES = 0x7FFF0000
"""What a program that can't go back writes for the size, or more."""
_EXACT_FORMATS = frozenset(("aiff", "asf", "caf", "flac", "matroska", "mov", "nistsphere", "wav"))
"""FFmpeg's formats whose header tells the length; of others it guesses by the bit rate."""
_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3", b"caff", b".snd")
"""First bytes of files that are no raw G.722, whatever their name says."""
# These open further files or addresses that they name; a file must speak for itself alone.
_PLAYLISTS = frozenset(("concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp",
                        "smoothstreaming", "vobsub", "webm_dash_manifest"))
_CONTAINER_OPTIONS = {"format_whitelist": ",".join(sorted(av.formats_available - _PLAYLISTS)),
                      "protocol_whitelist": "none"}


class AudioError(ListenError):
    """An audio file or member that can't be used; the message says why."""


class UnreachableAudio(AudioError):
    """The system doesn't hand the file out (missing, no permission, I/O error); it may another time."""


@dataclass(frozen=True)
class Sound:
    """A decoded clip."""

    samples: np.ndarray
    """float32 [S] at 16 kHz, whole multiples of 1/32768."""
    remarks: tuple[str, ...] = ()
    """What one should know of it though it can be used; each begins with its kind, perhaps a colon and details."""


@dataclass(frozen=True)
class _Mono:
    """What was read of a file."""

    samples: np.ndarray
    """float32 [S'] at `rate`, channels averaged or one of them."""
    rate: int
    powers: np.ndarray
    """float64 [C]: each channel's sum of squares."""
    is_float: bool
    """The file holds floats, which may have any scale."""
    remarks: tuple[str, ...]


def decode_audio(source: bytes | str | os.PathLike[str], max_seconds: float = 30.0) -> np.ndarray:
    """The samples of `read_audio`, float32 [S] at 16 kHz."""
    return read_audio(source, max_seconds).samples


def read_audio(source: bytes | str | os.PathLike[str], max_seconds: float = 30.0) -> Sound:
    """Decode a file or pipe (by path) or bytes; channels are averaged, or one is taken where they cancel each other.

    Raises:
        AudioError: not readable as audio, empty, not finite, longer than `max_seconds` or absurd;
            for a path the message starts with it.
        UnreachableAudio: the same where it is the system that refuses.
    """
    name = "" if isinstance(source, bytes) else f"{os.fspath(source)}: "
    try:
        if isinstance(source, str) and "://" in source:
            raise AudioError("an address, not a file; download it first")
        if not isinstance(source, bytes):
            source = _reached(Path(source))
        mono = _decode_any(source, max_seconds, None)
        if len(mono.powers) > 1 and _cancels(mono):
            loudest = int(mono.powers.argmax())
            one = _decode_any(source, max_seconds, loudest)
            remark = f"channels cancel each other: channel {loudest + 1} of {len(mono.powers)} is used alone"
            mono = replace(one, remarks=(*one.remarks, remark))
        return _to_model_audio(mono, max_seconds)
    except AudioError as error:
        raise type(error)(f"{name}{error}") from None


def join_utterances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two waveforms [S1], [S2] at 16 kHz with 0.1 s of silence between them; float32 [S]."""
    silence = np.zeros(round(JOIN_SILENCE_SECONDS * SAMPLE_RATE), dtype=np.float32)
    return np.concatenate([first, silence, second]).astype(np.float32, copy=False)


def to_pcm16(waveform: np.ndarray) -> np.ndarray:
    """Float [S] as int16 [S], the nearest that 16 bits hold; values outside -1 to 1 are clipped."""
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def as_stored(waveform: np.ndarray) -> np.ndarray:
    """Float [S] as a shard gives it back: float32 [S], rounded to 16 bits."""
    return to_pcm16(waveform).astype(np.float32) / np.float32(32768)


def is_audio_name(name: str) -> bool:
    """Whether a file found in a folder is taken for audio; `._name` is a Mac's note about `name`."""
    return not name.startswith("._") and Path(name).suffix.lower() in AUDIO_SUFFIXES


def probe_seconds(path: str | os.PathLike[str]) -> float | None:
    """Return the length in seconds as the file's header tells it, or None where that takes decoding.

    Of an MP3 it may be a guess by the bit rate.
    """
    try:
        if _is_raw_g722(Path(path)):
            return os.path.getsize(path) / 8000  # 64 kbit/s, no header
        return float(soundfile.info(os.fspath(path)).duration)
    except (soundfile.SoundFileError, OSError, ValueError):
        return None


def _reached(path: Path) -> Path | bytes:
    """The file, once the system hands it out; of a pipe, such as a shell's `<(…)`, its bytes, which come once only."""
    try:
        if path.is_dir():
            raise AudioError("a folder, not a file")
        if path.is_fifo():
            with path.open("rb") as pipe:
                content = pipe.read(_PIPE_BYTES + 1)
            if len(content) > _PIPE_BYTES:
                raise AudioError(f"a pipe of more than {_PIPE_BYTES >> 20} MiB: write it to a file first")
            return content
        with path.open("rb") as file:
            file.read(1)
        return path
    except FileNotFoundError:
        raise UnreachableAudio("no such file") from None
    except OSError as error:
        raise UnreachableAudio(f"can't be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise AudioError(f"no name of a file ({error})") from None


def _check_read_whole(path: Path) -> None:
    """Tell a disk that fails in the middle from a file that ends there: libsndfile takes both for the end."""
    try:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        raise UnreachableAudio(f"can't be read: {error.strerror or error}") from None


def _is_raw_g722(path: Path) -> bool:
    """G.722 has no header: its name tells it, unless its first bytes are another format's."""
    if path.suffix.lower() != ".g722":
        return False
    with path.open("rb") as file:
        return not file.read(4).startswith(_MAGIC)


def _decode_any(source: bytes | Path, max_seconds: float, channel: int | None) -> _Mono:
    """Read all channels' mean, or one of them."""
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        raise AudioError("empty file (0 bytes)")
    if isinstance(source, Path) and _is_raw_g722(source):
        return _decode_av(source, max_seconds, channel, "g722")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
    except soundfile.SoundFileError:
        return _decode_av(source, max_seconds, channel)
    with file:
        # Of an MP3 without a table libsndfile guesses the length, and cuts off or promises what isn't there.
        if file.frames >= _UNKNOWN_FRAMES or file.format == "MP3":
            return _decode_av(source, max_seconds, channel)
        try:
            mono = _read_soundfile(file, max_seconds, channel)
        except soundfile.SoundFileError as error:
            failure = getattr(error, "error_string", "") or str(error)
        else:
            if mono.remarks and isinstance(source, Path):
                _check_read_whole(source)
            return mono
    try:
        return _decode_av(source, max_seconds, channel)
    except UnreachableAudio:
        raise
    except AudioError:
        raise AudioError(f"damaged: {failure}") from None


class _Collector:
    """Blocks [C, S'] of a file that become one channel, so that many channels never lie in memory at full length."""

    def __init__(self, rate: int, channels: int, max_seconds: float, channel: int | None) -> None:
        _check_format(rate, channels)
        self.rate = rate
        self._max_seconds = max_seconds
        self._channel = channel
        self._blocks: list[np.ndarray] = []
        self._powers = np.zeros(channels)
        self.length = 0

    def add(self, block: np.ndarray, claimed: float | None) -> None:
        """float32 [C, S']; `claimed` seconds of the whole by its header, for the message."""
        with np.errstate(invalid="ignore"):  # NaN, infinities: refused in the end
            self._powers += np.square(block, dtype=np.float64).sum(axis=1)
        if self._channel is not None or len(block) == 1:
            self._blocks.append(block[self._channel or 0].copy())
        else:
            self._blocks.append(block.mean(axis=0, dtype=np.float32))
        self.length += block.shape[1]
        if self.length > self._max_seconds * self.rate:
            raise _too_long(claimed or 0, self._max_seconds)

    def result(self, promised: float | None, is_float: bool, lost: int = 0, packets: int = 0) -> _Mono:
        samples = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.float32)
        seconds = self.length / self.rate
        remarks = []
        if promised is not None and seconds < promised - _SHORTER_SECONDS:
            remarks.append(f"shorter than its header says: {seconds:.2f} of {promised:.2f} s")
        if lost:
            remarks.append(f"partly damaged: {lost} of {packets} packets are left out")
        return _Mono(samples, self.rate, self._powers, is_float, tuple(remarks))


def _read_soundfile(file: soundfile.SoundFile, max_seconds: float, channel: int | None) -> _Mono:
    rate, channels = int(file.samplerate), int(file.channels)
    collector = _Collector(rate, channels, max_seconds, channel)
    # A header's claim is trusted with neither memory nor length: how much a read returned is what there is.
    size = _BLOCK_VALUES // channels
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        collector.add(block.T, file.frames / rate)
    return collector.result(_written_frames(file) / rate, file.subtype in ("FLOAT", "DOUBLE"))


def _written_frames(file: soundfile.SoundFile) -> float:
    """The length by the header. Of a file cut short libsndfile says the real one, and the header's in its log."""
    found = _CUT_SHORT.search(file.extra_info)
    if not found or int(found[1]) >= _PIPED_BYTES or not int(found[2]):
        return file.frames
    return file.frames * int(found[1]) / int(found[2])


def _decode_av(source: bytes | Path, max_seconds: float, channel: int | None,
               container_format: str | None = None) -> _Mono:
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            return _read_av(file, max_seconds, channel, container_format)
    except OSError as error:
        # FFmpeg's own errors carry the same types; those of the file system come from reading `file`.
        if not isinstance(error, av.error.FFmpegError) and isinstance(source, Path):
            if error.errno == errno.EINVAL:  # a damaged file sends FFmpeg to before its start: bytes bear with that
                return _decode_av(source.read_bytes(), max_seconds, channel, container_format)
            raise UnreachableAudio(f"can't be read: {error.strerror or error}") from None
        raise AudioError(f"can't be decoded: {error.strerror or error}") from None
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(f"can't be decoded: {getattr(error, 'strerror', None) or error}") from None


def _read_av(file: BinaryIO, max_seconds: float, channel: int | None, container_format: str | None) -> _Mono:
    collector: _Collector | None = None
    lost = packets = 0
    with av.open(file, mode="r", format=container_format, options=_CONTAINER_OPTIONS) as container:
        if not container.streams.audio:
            raise AudioError("holds no audio stream")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise AudioError("can't be decoded: a codec that FFmpeg doesn't know")
        if stream.codec_context.name == "flac":
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        promised = None
        for packet in _packets(container, stream):
            if not packets:
                promised = _promised_seconds(container, stream, packet, file)
            packets += 1
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                lost += 1
                continue
            for frame in frames:
                if collector is None:
                    collector = _Collector(frame.sample_rate, len(frame.layout.channels), max_seconds, channel)
                    layout, rate = frame.layout, frame.sample_rate
                # An SBR header or a chained stream may change both in the middle; the first frame's stay.
                # Not a plane for each channel: of eight, PyAV counts nine planes, and the last leads nowhere.
                to_float = av.AudioResampler(format="flt", layout=layout, rate=rate)
                for converted in [*to_float.resample(frame), *to_float.resample(None)]:
                    block = converted.to_ndarray().reshape(-1, len(layout.channels)).T
                    collector.add(np.ascontiguousarray(block), promised)
    if collector is None:
        raise AudioError("holds no samples" if not lost else f"damaged: none of {packets} packets can be decoded")
    if lost > packets // 2:
        raise AudioError(f"damaged: {lost} of {packets} packets can't be decoded")
    return collector.result(promised, stream.codec_context.name.startswith("pcm_f"), lost, packets)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets up to the end, or to where the container is too damaged to go on."""
    first = True
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:
            if first:
                raise
            return
        first = False
        yield packet


def _promised_seconds(container: Any, stream: Any, first: Any, file: BinaryIO) -> float | None:
    """The length by the header, None where FFmpeg only guesses it by the bit rate."""
    kind = container.format.name.split(",")[0]
    if kind == "mp3" and first.pos:  # a table of an encoder tells it, in a frame before the first that sounds
        place = file.tell()
        file.seek(max(0, first.pos - 4096))
        head = file.read(min(first.pos, 4096))
        file.seek(place)
        exact = any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))
    else:
        exact = kind in _EXACT_FORMATS
    return float(stream.duration * stream.time_base) if exact and stream.duration else None


def _check_format(rate: int, channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels; expected 1 to {MAX_CHANNELS}")
    if rate < 1:
        raise AudioError(f"sample rate {rate} Hz")
    divisor = math.gcd(rate, SAMPLE_RATE)
    if (rate // divisor) * (SAMPLE_RATE // divisor) > _MAX_RESAMPLING_TAPS:
        raise AudioError(f"odd sample rate {rate} Hz; resample it first, to 16 kHz for instance")


def _too_long(claimed: float, max_seconds: float) -> AudioError:
    """What to say of a file that went on beyond the limit; `claimed` seconds by its header, 0 where unknown."""
    if claimed <= max_seconds:
        return AudioError(f"longer than the limit of {max_seconds:g} s")
    # As many digits as show that it is more.
    digits = next(n for n in range(1, 12) if n == 11 or float(f"{claimed:.{n}f}") > max_seconds)
    return AudioError(f"{claimed:.{digits}f} s long by its header; the limit is {max_seconds:g} s")


def _cancels(mono: _Mono) -> bool:
    power, channels = float(np.square(mono.samples, dtype=np.float64).sum()), len(mono.powers)
    return power < _CANCELLED * mono.powers.mean() / channels  # False where one isn't finite: that is said later


def _to_model_audio(mono: _Mono, max_seconds: float) -> Sound:
    """Check, resample, scale and round what was read."""
    wave, seconds, remarks = mono.samples, len(mono.samples) / mono.rate, list(mono.remarks)
    if seconds < MIN_SECONDS:
        raise AudioError(f"holds {len(wave)} samples, less than {MIN_SECONDS} s")
    # Extremes pass NaN and infinities on, and make no array of the clip's length.
    if not (np.isfinite(wave.min()) and np.isfinite(wave.max())):
        raise AudioError("holds values that are not finite (NaN or infinity)")
    peak = max(float(wave.max()), -float(wave.min()))
    if mono.is_float and peak > _OVERSHOOT:
        # Scaled, not refused: the sound is whole, and the encoders look at level differences within a clip.
        remarks.append(f"scaled: floats up to {peak:.4g} where 1 is full scale")
        wave = wave / np.float32(peak)
    if mono.rate != SAMPLE_RATE:
        wave = torchaudio.functional.resample(torch.from_numpy(wave), mono.rate, SAMPLE_RATE).numpy()
    wave = as_stored(wave)
    if wave.min() == wave.max():
        remarks.append("digital silence")
    return Sound(wave, tuple(remarks))
