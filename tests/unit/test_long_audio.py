"""Cutting and joining long recordings: nothing is lost, nothing doubled at the seams."""

from __future__ import annotations

import random

import numpy as np
import pytest

from listen_dist.inference.long_audio import OVERLAP_SECONDS, Piece, join, join_settled, split
from listen_dist.structures import SAMPLE_RATE

WORDS = ("the", "quick", "agent", "line", "is", "busy", "please", "hold", "your", "call", "now", "forward", "no",
         "yes", "to", "and", "a", "number", "press", "dial", "again", "later", "one", "two", "three", "thank", "you")


def speak(seed: int, seconds: float, pause_every: int) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """A recording of buzzes, and the word that each stands for with its first and last sample.

    Words follow each other without a gap but for a pause of 0.4 to 0.9 s after each `pause_every`; 0: none.
    """
    draw = random.Random(seed)
    waves: list[np.ndarray] = []
    spoken: list[tuple[str, int, int]] = []
    at = 0
    while at < seconds * SAMPLE_RATE:
        size = int(draw.uniform(0.25, 0.6) * SAMPLE_RATE)
        waves.append(0.3 * np.sin(np.arange(size) * draw.uniform(0.05, 0.3)))
        spoken.append((draw.choice(WORDS), at, at + size))
        at += size
        if pause_every and len(spoken) % pause_every == 0:
            waves.append(0.002 * np.sin(np.arange(int(draw.uniform(0.4, 0.9) * SAMPLE_RATE))))
            at += len(waves[-1])
    return np.concatenate(waves).astype(np.float32), spoken


def transcribe(piece: Piece, spoken: list[tuple[str, int, int]]) -> str:
    """Whole words as they are, a word that is cut as the part that is heard."""
    heard = []
    for word, start, end in spoken:
        if piece.start <= start and end <= piece.end:
            heard.append(word)
        elif start < piece.end and end > piece.start:
            heard.append(f"{word[0]}-" if start >= piece.start else f"-{word[-1]}")
    return " ".join(heard)


@pytest.mark.parametrize("pause_every", [5, 12, 0])
def test_nothing_is_lost_or_doubled_at_the_seams(pause_every: int) -> None:
    seams = 0
    for seed in range(15):
        wave, spoken = speak(seed, 100, pause_every)
        pieces = split(wave, 30)
        seams += len(pieces) - 1
        assert all(0 < piece.end - piece.start <= 30 * SAMPLE_RATE for piece in pieces)
        assert pieces[0].start == 0 and pieces[-1].end == len(wave)
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert before.start < after.start <= before.end < after.end  # every sample is in a piece
            assert after.overlap == (0 if pause_every else OVERLAP_SECONDS)
        texts = [transcribe(piece, spoken) for piece in pieces]
        overlaps, words = [piece.overlap for piece in pieces], [word for word, _, _ in spoken]
        assert join(texts, overlaps).split() == words
        for known in range(1, len(pieces) + 1):  # what is given out early is never taken back
            settled = join_settled(texts[:known], overlaps[: known + 1]).split()
            assert settled == words[: len(settled)]
            assert len(settled) >= len(join(texts[:known], overlaps[:known]).split()) - 10
        if not pause_every:  # there is something to repair
            assert sum(len(text.split()) for text in texts) > len(spoken) + 2 * len(pieces)
    assert seams >= 45


def test_a_recording_within_the_window_stays_whole() -> None:
    for samples in (1, 30 * SAMPLE_RATE):
        assert split(np.ones(samples, np.float32), 30) == [Piece(0, samples)]
    assert len(split(np.ones(30 * SAMPLE_RATE + 1, np.float32), 30)) == 2


def test_digital_silence_is_cut_too() -> None:
    pieces = split(np.zeros(100 * SAMPLE_RATE, np.float32), 30)
    assert pieces[-1].end == 100 * SAMPLE_RATE and all(piece.overlap == 0 for piece in pieces)


@pytest.mark.parametrize("left, right, overlap, joined", [
    ("we go no no", "no no they said", 0, "we go no no no no they said"),  # said twice, cut in a pause
    ("we go no no", "no no they said", 2, "we go no no they said"),
    ("Please hold, the Li", "ease hold the line now", 2, "Please hold, the line now"),
    ("one two three", "four five six", 2, "one two three four five six"),  # nothing in common: nothing is dropped
    ("x b c a", "a b c d", 2, "x b c a b c d"),  # a longer run is no match if words beside it would be lost
    ("", "four five", 2, "four five"),
    ("one two", "", 2, "one two"),
])
def test_seams(left: str, right: str, overlap: float, joined: str) -> None:
    assert join([left, right], [0, overlap]) == joined


def test_a_silent_piece_between_keeps_both_sides() -> None:
    assert join(["a b", "", "a b"], [0, 2, 2]) == "a b a b"
