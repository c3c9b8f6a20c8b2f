#!/usr/bin/env python3
"""Write `asr` manifests of clips in which nothing is said, so that no text is right: silence, noise, sounds, music.

    python tools/prepare/no_speech.py
    python tools/prepare/no_speech.py --clips 400 --out /data/manifests --recordings /data/recordings

Sounds and music are those of caption.{train,dev,test}.jsonl (run sound_effects.py first), in the same splits; loops,
ambience and instruments count as music, and creatures' sounds, some of which speak, are left out. Digital silence and
low noise are made here, in <recordings>/no_speech. Written: no_speech.{train,dev,test}.jsonl, each record with
meta.no_speech. Length and loudness follow from md5 of a clip's name, so the files come out the same every time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
from phone_rules import SPLITS, digest, id_split, record_id
from recipe import recordings_parser, require, run_main

from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import SAMPLE_RATE, Record

FOLDER = "no_speech"
HUNDREDTHS = range(50, 1000)
"""Length of a made clip."""
DECIBELS = range(-70, -29)
"""Loudness of made noise, relative to full scale."""
MUSIC = re.compile(r"sonic-pi-(loop|ambi|bass|guit|mehackit|tabla)_")
VOICED = re.compile(r"human|woman|man-|male|girl|boy|laugh|voice|vox|speech|hello|cough|scream|groan|orc|elf|dwarf"
                    r"|goblin|troll|mermaid|naga|drake|saurian|gryphon|hit|die|hurt", re.IGNORECASE)


def main() -> None:
    """Make silence and noise, borrow sounds, and write the manifests."""
    parser = recordings_parser(__doc__)
    parser.add_argument("--clips", type=int, default=200, help="of silence and noise together (default 200)")
    options = parser.parse_args()
    out = options.out.resolve()
    records = [*borrowed(out), *made(options.recordings.resolve() / FOLDER, options.clips)]
    for split in SPLITS:
        group = [record for record in records if record.split == split]
        write_manifest(out / f"no_speech.{split}.jsonl", group)
        minutes = sum(record.duration or 0.0 for record in group) / 60
        kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(str(r.meta["kind"]) for r in group).items())
        print(f"no_speech.{split}: {len(group)} clips, {minutes:.1f} minutes: {kinds}")


def borrowed(manifests: Path) -> Iterator[Record]:
    """The sounds of the caption manifests that are nobody's voice."""
    for split in SPLITS:
        path = require(manifests / f"caption.{split}.jsonl", "run tools/prepare/sound_effects.py first")
        for record in read_manifest(path):
            name = record.id.removeprefix("caption-")
            if not VOICED.search(" ".join((name, *record.references))):
                kind = "music" if MUSIC.match(name) else "sound"
                yield _silent(replace(record, id=record_id("nospeech", name)), kind)


def made(folder: Path, count: int) -> Iterator[Record]:
    """Digital silence and white noise in turns, as 16 kHz FLAC."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        kind = ("silence", "noise")[number % 2]
        name = record_id("nospeech", kind, f"{number:05d}")
        path = folder / f"{name}.flac"
        seconds = HUNDREDTHS[digest(f"seconds/{name}") % len(HUNDREDTHS)] / 100
        if not path.is_file():
            soundfile.write(path, _waveform(name, kind, seconds), SAMPLE_RATE)
        yield _silent(Record(name, (str(path),), "asr", duration=seconds, language="en", split=id_split(name)), kind)


def _waveform(name: str, kind: str, seconds: float) -> np.ndarray:
    samples = round(seconds * SAMPLE_RATE)
    if kind == "silence":
        return np.zeros(samples, np.float32)
    level = 10 ** (DECIBELS[digest(f"level/{name}") % len(DECIBELS)] / 20)
    noise = np.random.default_rng(digest(name) % 2**63).standard_normal(samples) * level
    return noise.clip(-1, 1).astype(np.float32)


def _silent(record: Record, kind: str) -> Record:
    return replace(record, task="asr", target="", references=(), meta={"kind": kind, "no_speech": True})


if __name__ == "__main__":
    run_main(main)
