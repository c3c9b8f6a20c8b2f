"""tools/prepare/other_speech.py on made-up folders: whose transcripts are taken, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/prepare"))

import other_speech
from recipe import PrepareError


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(8000, np.float32), 16000)


def test_only_names_that_file_and_text_agree_on(tmp_path: Path) -> None:
    """A toucan's file says `tucan`: what is said in it is anyone's guess."""
    for name, text in (("birds-owl", "An owl.\nfr.utf8=Une chouette."), ("cat", "A cat."), ("tucan", "A toucan."),
                       ("empty", ""), ("textless", None)):
        sound(tmp_path / f"{name}_desc.ogg")
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    found = other_speech.animals(tmp_path)
    assert [(record.id, record.target, record.duration) for record in found] == [
        ("other-animals-birds-owl", "owl", 0.5), ("other-animals-cat", "cat", 0.5)]


def test_readings_by_their_transcription(tmp_path: Path) -> None:
    for kind, transcription in other_speech.READINGS.items():
        sound(tmp_path / kind / "1-a.wav")
        (tmp_path / transcription).write_text(f"<s> the {kind} say  </s> (1-a)\n")
    assert [(r.id, r.target) for r in other_speech.readings(tmp_path)] == [
        ("other-cards-1-a", "the cards say"), ("other-librivox-1-a", "the librivox say")]
    (tmp_path / other_speech.READINGS["cards"]).write_text("no such line\n")
    with pytest.raises(PrepareError, match="cards.transcription: no transcription: 'no such line'"):
        other_speech.readings(tmp_path)


def test_which_files_are_taken() -> None:
    stamps, sphinx = other_speech.STAMPS, other_speech.SPHINX
    assert other_speech._stamp(f"{stamps}birds/owl_desc.ogg") == "other_speech/animals/birds-owl_desc.ogg"
    assert other_speech._stamp(f"{stamps}birds/owl_desc_fr.ogg") is None
    assert other_speech._stamp("usr/share/tuxpaint/stamps/food/egg.txt") is None
    assert other_speech._reading(f"{sphinx}cards/001.wav") == "other_speech/cards/001.wav"
    assert other_speech._reading(f"{sphinx}numbers.raw") is None
