"""tools/prepare/joined_prompts.py on made-up prompts: what is drawn, how it sounds, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/prepare"))

import joined_prompts

from listen_dist.data.decode import decode_audio
from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import Record

RATE = 16_000


@pytest.fixture
def prompts(tmp_path: Path) -> list[Record]:
    """Ten tones of 0.5 s, of 200, 300 … Hz, and one of 13 s."""
    records = []
    for number in range(11):
        path, seconds = tmp_path / f"{number}.wav", 13.0 if number == 10 else 0.5
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * (200 + 100 * number) * np.arange(seconds * RATE) / RATE), RATE)
        records.append(Record(id=f"asr-{number}", audio=(str(path),), task="asr", target=f"tone {number}",
                              language="en", speaker="sine", duration=seconds, split="train"))
    return records


def test_clips_are_drawn_by_their_number_and_no_row_is_too_long(prompts: list[Record]) -> None:
    clips = [joined_prompts.draw(prompts, number) for number in range(300)]
    first = clips[0]  # other ids orphan the recordings that are there
    assert (first.id, first.percent, len(first.prompts)) == ("joined-000000-773e04", 105, 3)
    assert len({clip.id for clip in clips}) == 300
    assert {len(clip.prompts) for clip in clips} == {1, 2, 3, 4}
    assert {clip.percent for clip in clips} == set(range(90, 111))
    rows = [sum(prompt.duration or 0 for prompt in clip.prompts) for clip in clips]
    assert all(seconds <= 12 or len(clip.prompts) == 1 for seconds, clip in zip(rows, clips, strict=True))


def test_a_row_sounds_as_its_prompts_do_at_its_speed(prompts: list[Record], tmp_path: Path) -> None:
    clip = next(clip for clip in (joined_prompts.draw(prompts[:10], n) for n in range(99))
                if len(clip.prompts) == 2 and clip.percent < 95)
    record = joined_prompts.write(clip, tmp_path)
    wave = decode_audio(record.audio[0])
    assert record.target == " ".join(prompt.target for prompt in clip.prompts)
    assert record.duration == pytest.approx(len(wave) / RATE, abs=1e-4)
    half = round(0.5 * RATE * 100 / clip.percent)
    for prompt, tone in zip(clip.prompts, (wave[:half], wave[-half:]), strict=True):
        heard = np.abs(np.fft.rfft(tone)).argmax() * RATE / len(tone)
        assert heard == pytest.approx((200 + 100 * int(prompt.id[4:])) * clip.percent / 100, abs=4)
    pause = np.abs(wave[half:-half])
    assert 0.05 <= len(pause) / RATE * clip.percent / 100 < 0.61
    assert pause[len(pause) // 4 : -len(pause) // 4].max() < 0.01


def test_from_the_manifest_to_the_manifest(prompts: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path / "asr.train.jsonl", prompts)
    command = ["joined_prompts.py", "--out", str(tmp_path), "--recordings", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--clips", "12"])
    joined_prompts.main()
    assert "asr_joined.train: 12 clips of 11 prompts" in capsys.readouterr().out
    many = list(read_manifest(tmp_path / "asr_joined.train.jsonl"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "joined_prompts").iterdir()}
    assert len(many) == len(times) == 12
    monkeypatch.setattr(sys, "argv", [*command, "--clips", "5"])
    joined_prompts.main()
    few = list(read_manifest(tmp_path / "asr_joined.train.jsonl"))
    assert few == many[:5], "a smaller run is a part of a bigger one"
    assert times == {path: path.stat().st_mtime_ns for path in times}, "a finished clip is kept"


def test_a_missing_manifest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["joined_prompts.py", "--out", str(tmp_path), "--recordings", str(tmp_path)])
    with pytest.raises(joined_prompts.PrepareError, match="asr.train.jsonl is missing: run phone_prompts.py first"):
        joined_prompts.main()
