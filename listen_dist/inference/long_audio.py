"""Recordings longer than the encoder's window: cut in pauses, texts joined again. Pure functions.

Where the second half of a window holds a pause, it is cut there; both pieces keep some of the pause, so that no
word is in both and none is cut. Where nobody pauses, pieces overlap by `OVERLAP_SECONDS`, and the words that
both texts hold there are kept once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from listen_dist.structures import SAMPLE_RATE

OVERLAP_SECONDS = 2.0
"""Heard twice where there is no pause."""
PAUSE_SECONDS = 0.2
"""Shortest pause that is cut in."""
MARGIN_SECONDS = 0.25
"""What a piece keeps of a pause beyond the cut, at most."""
QUIET = 0.05
"""A frame under this share of the window's loud frames (95th percentile; -26 dB) is part of a pause."""
WORDS_PER_SECOND = 5
"""Nobody says more; bounds the words that can be in both texts."""
_FRAME = SAMPLE_RATE // 50


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording, in samples."""

    start: int
    end: int
    overlap: float = 0
    """Seconds at its start that the piece before holds too and that may hold words; 0 after a pause."""


def split(wave: np.ndarray, window: float) -> list[Piece]:
    """Cut a waveform [S] at 16 kHz into pieces of at most `window` seconds that together hold every sample."""
    longest = int(window * SAMPLE_RATE)
    pieces: list[Piece] = []
    start, overlap = 0, 0.0
    while len(wave) - start > longest:
        pause = _longest_pause(wave[start : start + longest])
        if pause is None:
            end, shared = start + longest, OVERLAP_SECONDS
            following = end - int(OVERLAP_SECONDS * SAMPLE_RATE)
        else:
            first, last = start + pause[0], start + pause[1]
            cut, margin = (first + last) // 2, int(MARGIN_SECONDS * SAMPLE_RATE)
            end, following, shared = min(last, cut + margin), max(first, cut - margin), 0.0
        pieces.append(Piece(start, end, overlap))
        start, overlap = following, shared
    return [*pieces, Piece(start, len(wave), overlap)]


def _longest_pause(wave: np.ndarray) -> tuple[int, int] | None:
    """First and last sample of the longest pause in the second half of a waveform [S]."""
    frames = wave[: len(wave) // _FRAME * _FRAME].reshape(-1, _FRAME)
    loudness = np.sqrt(np.square(frames, dtype=np.float64).mean(1))
    quiet = loudness <= QUIET * np.percentile(loudness, 95)
    quiet[: len(quiet) // 2] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)  # first frame, frame behind the last
    if not len(runs):
        return None
    first, behind = runs[np.argmax(runs[:, 1] - runs[:, 0])] * _FRAME
    return (int(first), int(behind)) if behind - first >= PAUSE_SECONDS * SAMPLE_RATE else None


def join(texts: Sequence[str], overlaps: Sequence[float]) -> str:
    """The text of a recording from those of its pieces.

    Args:
        overlaps: each piece's `overlap` in seconds.
    """
    words: list[str] = []
    before: list[str] = []  # the words of the piece before
    for text, seconds in zip(texts, overlaps, strict=True):
        own = text.split()
        most = min(len(before), math.ceil(seconds * WORDS_PER_SECOND))
        keep, skip = _seam(before[len(before) - most :], own[:most])
        words = words[: len(words) - most + keep] + own[skip:]
        before = own[skip:]
    return " ".join(words)


def join_settled(texts: Sequence[str], overlaps: Sequence[float]) -> str:
    """What is certain of the text of a recording whose first pieces have these texts.

    Args:
        overlaps: each piece's `overlap` in seconds; one more than texts where another piece follows.
    """
    words = join(texts, overlaps[: len(texts)]).split()
    open_words = math.ceil(sum(overlaps[len(texts) :]) * WORDS_PER_SECOND)
    return " ".join(words[: max(0, len(words) - open_words)])


def _seam(tail: Sequence[str], head: Sequence[str]) -> tuple[int, int]:
    """How many words of `tail` to keep and of `head` to skip.

    Both texts have the words of the overlap; the tail may end, and the head begin, with half a word. So the best
    common run is long and leaves few words behind it in the tail and before it in the head. Where there is none
    that is longer than what it leaves out on either side, all words are kept.
    """
    a, b = ([word.casefold().strip(".,;:!?\"'") for word in words] for words in (tail, head))
    best, seam = (-math.inf, 0), (len(tail), 0)
    for i in range(len(a)):
        for j in range(len(b)):
            size = next((n for n in range(min(len(a) - i, len(b) - j)) if a[i + n] != b[j + n]),
                        min(len(a) - i, len(b) - j))
            left_out = (len(a) - i - size, j)
            merit = (size - sum(left_out), size)
            if size and max(left_out) <= size and merit > best:
                best, seam = merit, (i + size, j + size)
    return seam
