"""From waveforms to what the encoders read, on the clip's true length."""

from __future__ import annotations

import numpy as np
import torch
from torchaudio.compliance import kaldi
from transformers import WhisperFeatureExtractor

from listen_dist.structures import SAMPLE_RATE

MIN_SAMPLES = 400
"""One window of the spectrogram; a shorter clip is filled up with silence."""


class LogMel:
    """Waveforms to Whisper's log-mel spectrograms on their true length; picklable, for loader workers."""

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        self.mels: int = extractor.feature_size
        self._fft, self._hop = extractor.n_fft, extractor.hop_length
        self._window = torch.hann_window(extractor.n_fft)
        self._filters = torch.from_numpy(extractor.mel_filters).float().T  # [mels, bins]

    @classmethod
    def from_pretrained(cls, path: str) -> LogMel:
        """Read `preprocessor_config.json` of a Whisper folder or Hugging Face name."""
        return cls(WhisperFeatureExtractor.from_pretrained(path))

    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        """float32 [S] at 16 kHz → float32 [mels, M], M = max(S, 400) // 160 frames of 10 ms."""
        if len(waveform) < MIN_SAMPLES:
            waveform = np.pad(waveform, (0, MIN_SAMPLES - len(waveform)))
        # WhisperFeatureExtractor's values within a rounding: it takes a root for each power and squares it again,
        # which took most of the time.
        spectrum = torch.stft(torch.from_numpy(waveform)[None], self._fft, self._hop, window=self._window,
                              return_complex=True)[0, :, :-1].T  # [M, bins], as it lies in memory
        parts = torch.view_as_real(spectrum).square()
        power = parts[..., 0] + parts[..., 1]
        log_mel = (self._filters @ power.T).clamp_(min=1e-10).log10_()
        return (torch.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0


class Fbank:
    """Waveforms to the Kaldi filterbanks of BEATs on their true length; picklable, for loader workers."""

    BINS = 128
    MEAN, STD = 15.41663, 6.55582
    """Over AudioSet, of its authors; they divide by twice the deviation."""
    MIN_SAMPLES = 2800
    """16 windows of 25 ms, 10 ms apart: one patch. A shorter clip is filled up with silence."""

    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        """float32 [S] at 16 kHz → float32 [M, 128], M = 1 + (max(S, 2800) - 400) // 160 frames of 10 ms."""
        wave = torch.from_numpy(np.pad(waveform, (0, max(0, self.MIN_SAMPLES - len(waveform)))))
        bank = kaldi.fbank(wave[None] * 2**15, num_mel_bins=self.BINS, sample_frequency=SAMPLE_RATE,
                           frame_length=25, frame_shift=10)
        return (bank - self.MEAN) / (2 * self.STD)
