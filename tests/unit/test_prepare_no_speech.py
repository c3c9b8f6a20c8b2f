"""tools/prepare/no_speech.py: clips without speech come from caption manifests and from nothing, in their splits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/prepare"))

import no_speech
from recipe import PrepareError

from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import Record


def caption(name: str, *references: str) -> Record:
    return Record(f"caption-{name}", ("x.wav",), "caption", references=references or ("a thud",), split="dev")


def test_sounds_and_music_are_borrowed_and_voices_are_not(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="caption.train.jsonl is missing: run tools/prepare/sound_effects.py first"):
        list(no_speech.borrowed(tmp_path))
    for split in ("train", "test"):
        write_manifest(tmp_path / f"caption.{split}.jsonl", [])
    write_manifest(tmp_path / "caption.dev.jsonl", [
        caption("sonic-pi-loop_amen_flac"), caption("wesnoth-water_ogg"), caption("wesnoth-x_ogg", "a woman laughs")])
    records = list(no_speech.borrowed(tmp_path))
    assert [(r.id, r.meta["kind"], r.split, r.answers) for r in records] == [
        ("nospeech-sonic-pi-loop_amen_flac", "music", "dev", ("",)),
        ("nospeech-wesnoth-water_ogg", "sound", "dev", ("",))]


def test_silence_is_zero_and_noise_is_low(tmp_path: Path) -> None:
    records = list(no_speech.made(tmp_path, 6))
    write_manifest(tmp_path / "m.jsonl", records)
    assert list(read_manifest(tmp_path / "m.jsonl")) == records
    for record in records:
        wave, rate = soundfile.read(record.audio[0])
        assert rate == 16_000 and len(wave) / rate == pytest.approx(record.duration)
        level = np.sqrt((wave**2).mean())
        assert level == 0 if record.meta["kind"] == "silence" else 0 < level < 0.1
