"""Augmentation of training audio: speed, reverberation, noise, gain on the waveform; masks on the log-mel.

What a clip gets is drawn from (seed, id, epoch) alone, so it is the same on any rank and in any worker,
and another each time the clip comes round. Picklable, for loader workers.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import torch
import torchaudio.functional

from listen_dist.data.decode import AUDIO_SUFFIXES, AudioError, decode_audio, is_audio_name
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import INDEX_NAME, ShardIndex
from listen_dist.dist import derived_seed
from listen_dist.errors import ListenError
from listen_dist.schema import AugmentConfig, ConfigError, DataConfig
from listen_dist.structures import SAMPLE_RATE

logger = logging.getLogger(__name__)

PLAIN_RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
MAX_IMPULSE_SECONDS = 10.0
MAX_NOISE_SECONDS = 600.0
"""Of a noise in a shard, which is decoded whole; of a file only a stretch is read."""
MOST_DRAWS = 10
"""Sounds that are drawn for a clip before the run ends, where one after the other can't be used."""
MASKED_SHARE = 0.2
"""Most of a clip that one time mask covers."""


class Augmenter:
    """Draws and applies the changes that a config asks for.

    Args:
        config: what to do.
        seed: of the run.
        max_seconds: no clip is slowed down beyond this length.
        source: how shards of sounds are read from elsewhere.

    Raises:
        ConfigError: a folder of noise or impulse responses is missing or holds no audio file.
        ShardError, SourceError: as `ShardIndex.load`, where they come in shards.
    """

    def __init__(self, config: AugmentConfig, seed: int, max_seconds: float,
                 source: DataConfig = DataConfig()) -> None:  # noqa: B008
        self._config = config
        self._seed = seed
        self._max_samples = int(max_seconds * SAMPLE_RATE)
        self._noises = open_sounds("data.augment.noise", config.noise, source)
        self._rooms = open_sounds("data.augment.reverb", config.reverb, source)

    def generator(self, name: str, epoch: int) -> np.random.Generator:
        """The source of all that sample `name` gets in its `epoch`."""
        return np.random.default_rng(derived_seed("augment", self._seed, name, epoch))

    def waveform(self, wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """float32 [S] at 16 kHz → float32 [S'], S' ≠ S only by `speed`."""
        config = self._config
        if config.speed:
            wave = self._change_speed(wave, random)
        if self._rooms and random.random() < config.reverb_share:
            wave = reverberate(wave, self._rooms.whole(random, MAX_IMPULSE_SECONDS))
        if self._noises:
            noise = self._noises.stretch(len(wave), random)
            lowest, highest = config.noise_snr_db
            wave = add_noise(wave, noise, random.uniform(lowest, highest))
        if config.gain_db:
            wave = wave * np.float32(10 ** (random.uniform(-config.gain_db, config.gain_db) / 20))
        return wave

    def log_mel(self, spectrogram: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """Mask stretches of time and bands of a log-mel [mels, M] with its mean; a new tensor where it does."""
        config = self._config
        if not (config.time_masks or config.mel_masks):
            return spectrogram
        masked, mean = spectrogram.clone(), spectrogram.mean()
        bins, frames = spectrogram.shape
        longest = int(min(config.time_mask_seconds * 100, MASKED_SHARE * frames))
        for _ in range(config.time_masks):
            start, end = _stretch(frames, longest, random)
            masked[:, start:end] = mean
        for _ in range(config.mel_masks):
            start, end = _stretch(bins, min(config.mel_mask_bins, bins), random)
            masked[start:end] = mean
        return masked

    def _change_speed(self, wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
        steps = round(100 * self._config.speed)
        # In whole hundredths, so that the resampling filter stays small.
        percent = 100 + int(random.integers(-steps, steps + 1))
        if percent == 100 or len(wave) * 100 > self._max_samples * percent:
            return wave
        return torchaudio.functional.resample(torch.from_numpy(wave), percent, 100).numpy()


class Sounds(Protocol):
    """Sounds to draw from; truth tells whether there are any."""

    def __len__(self) -> int: ...

    def whole(self, random: np.random.Generator, max_seconds: float) -> np.ndarray:
        """One of them, float32 [S] at 16 kHz."""

    def stretch(self, length: int, random: np.random.Generator) -> np.ndarray:
        """A random stretch of one, float32 [length] at 16 kHz mono; a shorter sound is repeated."""


class SoundFiles(list[str]):
    """Audio files by their paths."""

    def whole(self, random: np.random.Generator, max_seconds: float) -> np.ndarray:
        """One of them, float32 [S] at 16 kHz."""
        return _draw(lambda: decode_audio(random.choice(self), max_seconds))

    def stretch(self, length: int, random: np.random.Generator) -> np.ndarray:
        """A random stretch of one, float32 [length]."""
        return _draw(lambda: read_stretch(random.choice(self), length, random))


class SoundShards:
    """The samples of a set of shards; their texts don't matter."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._ends = np.cumsum(index.counts)

    def __len__(self) -> int:
        return self._index.samples

    def whole(self, random: np.random.Generator, max_seconds: float) -> np.ndarray:
        """One of them, float32 [S] at 16 kHz."""
        return _draw(lambda: self._read(random, max_seconds))

    def _read(self, random: np.random.Generator, max_seconds: float) -> np.ndarray:
        number = int(random.integers(len(self)))
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - int(self._ends[shard] - self._index.counts[shard])
        wave = self._index.read_sample(shard, row, "audio", max_seconds).waveform
        assert wave is not None
        return wave

    def stretch(self, length: int, random: np.random.Generator) -> np.ndarray:
        """A random stretch of one, float32 [length]."""
        wave = self.whole(random, MAX_NOISE_SECONDS)
        start = int(random.integers(0, max(len(wave) - length, 0) + 1))
        return np.resize(wave[start : start + length], length)


def open_sounds(key: str, address: str, source: DataConfig) -> Sounds:
    """The sounds of a folder of audio files or of a set of shards; none without an address.

    Raises:
        ConfigError: the folder holds neither.
        ShardError, SourceError: as `ShardIndex.load`.
    """
    if address and (re.search(r"://|\{", address) or Path(address, INDEX_NAME).is_file()):
        return SoundShards(ShardIndex.load(address, source))
    return SoundFiles(_audio_files(key, address))


def _draw(read: Callable[[], np.ndarray]) -> np.ndarray:
    """A sound, drawn again where one can't be used: it is named once, and the clip keeps its augmentation.

    Raises:
        ListenError: none of many can be used.
    """
    for _ in range(MOST_DRAWS):
        try:
            return read()
        except (AudioError, ShardError) as error:
            _name_unusable(str(error))
            last = error
    raise ListenError(f"{MOST_DRAWS} sounds in a row can't be used for augmentation, the last because: {last}")


@lru_cache(maxsize=10_000)  # once for each, in each loader process
def _name_unusable(reason: str) -> None:
    logger.warning("not used for augmentation: %s", reason)


def add_noise(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """float32 [S] + [S], the noise scaled so that the ratio of the mean powers is `snr_db`; silence stays as it is."""
    power, noise_power = _power(wave), _power(noise)
    if not power or not noise_power:
        return wave
    return wave + noise * np.float32(math.sqrt(power / noise_power / 10 ** (snr_db / 10)))


def reverberate(wave: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    """float32 [S] heard in the room of an impulse response [R]: as long, as loud, the direct sound in its place."""
    direct = int(np.argmax(np.abs(impulse)))
    full = torchaudio.functional.fftconvolve(torch.from_numpy(wave), torch.from_numpy(impulse)).numpy()
    wet = full[direct : direct + len(wave)]
    power = _power(wet)
    return wet * np.float32(math.sqrt(_power(wave) / power)) if power else wave


def read_stretch(path: str, length: int, random: np.random.Generator) -> np.ndarray:
    """Read a random stretch of a file as float32 [length] at 16 kHz mono; a shorter file is repeated."""
    wave = _seek_stretch(path, length, random)
    if wave is None:
        wave = decode_audio(path, MAX_NOISE_SECONDS)
        start = int(random.integers(0, max(len(wave) - length, 0) + 1))
        wave = wave[start : start + length]
    return np.resize(wave, length)


def _seek_stretch(path: str, length: int, random: np.random.Generator) -> np.ndarray | None:
    """The stretch alone, float32 [≤ length], of one of the plain formats; None where that takes decoding the whole."""
    try:
        with soundfile.SoundFile(path) as file:
            # Elsewhere a length is guessed, a place not found, or the rate or the channels want care.
            if file.format not in ("WAV", "WAVEX", "FLAC") or file.channels > 2 or file.samplerate not in PLAIN_RATES:
                return None
            frames = math.ceil(length * file.samplerate / SAMPLE_RATE)
            file.seek(int(random.integers(0, max(file.frames - frames, 0) + 1)))
            both = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError):
        return None
    mono = both.mean(axis=1)
    if not len(mono) or not np.isfinite(mono).all() or _power(mono) < 1e-3 * _power(both):
        return None
    if file.samplerate != SAMPLE_RATE:
        mono = torchaudio.functional.resample(torch.from_numpy(mono), file.samplerate, SAMPLE_RATE).numpy()
    return mono[:length]


def _power(wave: np.ndarray) -> float:
    return float(np.mean(np.square(wave, dtype=np.float64)))


def _stretch(size: int, longest: int, random: np.random.Generator) -> tuple[int, int]:
    """Start and end of a stretch of 0 … `longest` within `size`."""
    length = int(random.integers(0, longest + 1))
    start = int(random.integers(0, size - length + 1))
    return start, start + length


def _audio_files(key: str, folder: str) -> list[str]:
    """The audio files below a folder, sorted; none without a folder. Their headers are read, to fail at start."""
    if not folder:
        return []
    files = sorted(str(Path(root, name)) for root, _, names in os.walk(folder) for name in names
                   if is_audio_name(name))
    if not files:
        raise ConfigError(f"{key} = {folder!r}: holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) and no "
                          f"{INDEX_NAME} of shards")
    for file in files:
        try:
            empty = soundfile.info(file).frames < 1
        except soundfile.SoundFileError:
            _check_decodable(key, file)
        else:
            if empty:
                raise ConfigError(f"{key}: {file}: holds no samples; remove it")
    return files


def _check_decodable(key: str, file: str) -> None:
    """A file whose header libsndfile can't read is decoded once."""
    try:
        decode_audio(file, MAX_NOISE_SECONDS)
    except AudioError as error:
        raise ConfigError(f"{key}: {error}; remove it") from None
