#!/usr/bin/env python3
"""Join telephone prompts to longer clips for `asr`, each at a speed of its own: more to train on from few recordings.

    python tools/prepare/joined_prompts.py
    python tools/prepare/joined_prompts.py --clips 8000 --out /data/manifests --recordings /data/recordings

Takes the English prompts of asr.train.jsonl (phone_prompts.py), one to four in a row with a pause between them, played
at 0.9 to 1.1 times their speed, pitch included, as Kaldi's speed perturbation does (Ko et al. 2015, "Audio augmentation
for speech recognition"). Written: asr_joined.train.jsonl and 16 kHz FLAC files in <recordings>/joined_prompts. Prompts,
pauses and speeds follow from md5 of the clip's number, so a smaller run is a part of a bigger one, and a run that was
stopped goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional
from phone_rules import digest
from recipe import PrepareError, recordings_parser, require, run_main
from tqdm import tqdm

from listen_dist.data.decode import decode_audio
from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import SAMPLE_RATE, Record

FOLDER = "joined_prompts"
MOST_PROMPTS = 4
MAX_SECONDS = 12.0
"""Of the prompts in a clip, at their own speed; one that is longer stays alone."""
SPEED_PERCENT = range(90, 111)
PAUSE_PERCENT = range(5, 60)
"""Silence between two prompts, in hundredths of a second."""


@dataclass(frozen=True)
class Clip:
    """Prompts in a row."""

    number: int
    prompts: tuple[Record, ...]

    @property
    def id(self) -> str:
        """Name of the record and of the file."""
        return f"joined-{self.number:06d}-{digest(' '.join(p.id for p in self.prompts)) % 16**6:06x}"

    @property
    def percent(self) -> int:
        """Speed, in percent of the prompts' own."""
        return SPEED_PERCENT[digest(f"speed/{self.number}") % len(SPEED_PERCENT)]

    @property
    def text(self) -> str:
        """What is said, each prompt as it is written."""
        return " ".join(prompt.target for prompt in self.prompts)

    def waveform(self) -> np.ndarray:
        """float32 [S] at 16 kHz."""
        pieces: list[np.ndarray] = []
        for place, prompt in enumerate(self.prompts):
            pause = PAUSE_PERCENT[digest(f"pause/{self.number}/{place}") % len(PAUSE_PERCENT)] * SAMPLE_RATE // 100
            pieces += [np.zeros(pause if place else 0, np.float32), decode_audio(prompt.audio[0])]
        return torchaudio.functional.resample(torch.from_numpy(np.concatenate(pieces)), self.percent, 100).numpy()


def main() -> None:
    """Choose, join, write the manifest."""
    parser = recordings_parser(__doc__)
    parser.add_argument("--clips", type=int, default=4000, help="clips to make (default: 4000)")
    options = parser.parse_args()
    if options.clips < 1:
        raise PrepareError("--clips is a number above 0")
    out, folder = options.out.resolve(), options.recordings.resolve() / FOLDER
    prompts = list(read_manifest(require(out / "asr.train.jsonl", "run phone_prompts.py first")))
    folder.mkdir(parents=True, exist_ok=True)
    clips = [draw(prompts, number) for number in range(options.clips)]
    records = [write(clip, folder) for clip in tqdm(clips, desc="join", unit="clip", disable=None)]
    write_manifest(out / "asr_joined.train.jsonl", records)
    seconds = sum(record.duration or 0.0 for record in records)
    print(f"asr_joined.train: {len(records)} clips of {len(prompts)} prompts, {seconds / 3600:.2f} hours")


def draw(prompts: list[Record], number: int) -> Clip:
    """The prompts of one clip: as many as drawn, or fewer if they are long."""
    count = 1 + digest(f"count/{number}") % MOST_PROMPTS
    chosen = [prompts[digest(f"prompt/{number}/{place}") % len(prompts)] for place in range(count)]
    while len(chosen) > 1 and sum(prompt.duration or 0.0 for prompt in chosen) > MAX_SECONDS:
        chosen.pop()
    return Clip(number, tuple(chosen))


def write(clip: Clip, folder: Path) -> Record:
    """Write one clip's file, unless it is there."""
    path = folder / f"{clip.id}.flac"
    if not path.is_file():
        temporary = path.with_suffix(".tmp")
        soundfile.write(temporary, clip.waveform(), SAMPLE_RATE, format="FLAC")
        temporary.replace(path)
    return Record(
        id=clip.id,
        audio=(str(path),),
        task="asr",
        target=clip.text,
        language="en",
        speaker=clip.prompts[0].speaker,
        duration=round(soundfile.info(path).duration, 4),
        split="train",
    )


if __name__ == "__main__":
    run_main(main)
