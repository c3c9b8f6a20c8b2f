#!/usr/bin/env python3
"""Fetch the spoken lines of an adventure game, some thirty actors, and write `asr` manifests split by character.

    python tools/prepare/game_speech.py
    python tools/prepare/game_speech.py --out /data/manifests --recordings /data/recordings

The game is "Flight of the Amazon Queen" (Debian's flight-of-the-amazon-queen, 35 MB to download): free to distribute
and modify, not to be sold on its own; its licence is kept beside the clips. Written: game_speech.{train,dev,test}.jsonl
and MP3 clips (11 kHz, mono) in <recordings>/game_speech.

Whole characters are held out, women and men: faye and jim for test, secretary, bud and lou for dev; joe, the hero, is
in train. No sentence of test or dev is in train, those of the asr and asr_other manifests in OUT included (run
phone_prompts.py and other_speech.py first), and none of test in dev. What is left out is counted and named.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from debian_packages import fetch_files
from game_archive import HERO, Line, read_lines, read_table
from phone_rules import SPLITS, clean_transcript, normalise, record_id, words
from recipe import PrepareError, recordings_parser, report, run_main
from tqdm import tqdm

from listen_dist.data.decode import probe_seconds
from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import Record

FOLDER, ARCHIVE = "game_speech", "queen.1c"
PACKAGE = "flight-of-the-amazon-queen"
HELD_OUT = {"faye": "test", "jim": "test", "secretary": "dev", "bud": "dev", "lou": "dev"}
NAMES = {  # dialogues and cut scenes call the same person differently
    "sec": "secretary", "mary-lou": "lou", "jimmy": "jim", "joe king": HERO, "trader bob": "bob", "azura obj": "azura",
    "princess azura": "azura", "prin": "azura", "and": "anderson", "witch doctor": "witch", "zombie woman": "zombie",
    "wedge": "wedgewood", "showering amazon": "showeram",
}
UNKNOWN = frozenset(("narrator", "note", "path", "smoke", "telephone", "buttons", "torch", "door", "rock", "lily pad"))
"""Cut scenes let things speak for somebody who isn't seen: it may be a held-out character."""
ANIMALS = frozenset(("ape", "gorilla", "dog", "guard dog"))
"""They bark."""
NOT_ALOUD = frozenset("""alluring ass bra breast breasts concubines cretin damn damned drunk endowed erections gypped
    hell hubba idiot japs mating nazi nubile perky pygmies pygmy scum sex sexy stupid virgin virgins weenie""".split())
"""Words that a family would not say aloud, some because they insult a people."""
_NOISE = re.compile(r"\b(?!hm+\b|mrs\b)[b-df-hj-np-tv-xz]{3,}\b|([a-ln-z])\1\1", re.IGNORECASE)
"""A word without a vowel (a gagged prisoner's), a letter three times in a row (a shout's)."""
NO_TEXT, TWO_TEXTS = "clips without a text", "clips that two texts claim"
_SECONDS = (0.1, 30.0)

Dropped = dict[str, list[str]]
"""Why → names of the clips."""


def main() -> None:
    """Fetch, then write clips and manifests."""
    options = recordings_parser(__doc__).parse_args()
    recordings, out = options.recordings.resolve(), options.out.resolve()
    fetch_files({PACKAGE: _archive}, recordings)
    folder = recordings / FOLDER
    entries = read_table((folder / ARCHIVE).read_bytes())
    dropped: Dropped = defaultdict(list)
    lines = split_apart(choose_lines(entries, dropped), held_out_sentences(out), dropped)
    for name in tqdm([line.clip for line in lines], desc="clips", unit="file", disable=None):
        _write_clip(folder / f"{name}.mp3", entries[f"{name}.SB"])
    records = [_record(folder, line) for line in lines]
    for reason, names in dropped.items():
        if reason in (NO_TEXT, TWO_TEXTS):
            print(f"{reason}: {' '.join(names)}")
        report(reason, names)
    print(f"{'set':<13}{'split':<7}{'clips':>6}{'minutes':>9}  characters")
    for split in SPLITS:
        group = [record for record in records if record.split == split]
        write_manifest(out / f"game_speech.{split}.jsonl", group)
        minutes = sum(record.duration or 0.0 for record in group) / 60
        counts = Counter(record.speaker for record in group).most_common()
        shown = ", ".join(f"{name} {count}" for name, count in counts)
        print(f"{'game_speech':<13}{split:<7}{len(group):>6}{minutes:>9.1f}  {shown}")


def choose_lines(entries: dict[str, bytes], dropped: Dropped) -> list[Line]:
    """Return the lines that have a clip, a known speaker and English words, in the order of the clips' names."""
    texts: dict[str, list[Line]] = defaultdict(list)
    for line in read_lines(entries):
        texts[line.clip].append(line)
    chosen = []
    for name in sorted(name.removesuffix(".SB") for name in entries if name.endswith(".SB")):
        if name.endswith("SSSS"):
            continue  # sounds, not speech
        lines = [replace(line, text=clean_transcript(line.text), speaker=NAMES.get(line.speaker, line.speaker))
                 for line in texts[name]]
        if reason := _fault(lines):
            dropped[reason].append(name)
        else:
            chosen.append(lines[0])
    if not chosen:
        raise PrepareError(f"{ARCHIVE} holds no clip with a text; delete it and run again")
    return chosen


def _fault(lines: Sequence[Line]) -> str:
    """Why a clip with these texts can't be used, or ""."""
    if not lines or not lines[0].text:
        return NO_TEXT
    if len(set(lines)) > 1:
        return TWO_TEXTS
    (line,) = set(lines)
    if line.speaker in UNKNOWN:
        return "clips of nobody knows whom"
    if line.speaker in ANIMALS or _NOISE.search(line.text):
        return "clips of sounds, not words"
    if NOT_ALOUD.intersection(words(line.text)):
        return "clips that a family would not say aloud"
    return ""


def held_out_sentences(manifests: Path) -> set[str]:
    """Return the normalised sentences of other recordings that a model is tested on, as far as they are there."""
    paths = [manifests / f"{name}.jsonl" for name in ("asr.dev", "asr.test", "asr_other.test")]
    return {normalise(record.target) for path in paths if path.is_file() for record in read_manifest(path)}


def split_apart(lines: Iterable[Line], held: set[str], dropped: Dropped) -> list[Line]:
    """Leave out of train what is said in dev, test or `held`, and out of dev what is said in test."""
    lines = list(lines)
    said: dict[str, set[str]] = {split: set() for split in SPLITS}
    for line in lines:
        said[split_of(line)].add(normalise(line.text))
    forbidden = {"train": said["dev"] | said["test"] | held, "dev": said["test"], "test": set()}
    kept = []
    for line in lines:
        split = split_of(line)
        if normalise(line.text) in forbidden[split]:
            dropped[f"clips of {split} with a sentence of a held-out set"].append(line.clip)
        else:
            kept.append(line)
    return kept


def split_of(line: Line) -> str:
    """The split of a line's character."""
    return HELD_OUT.get(line.speaker, "train")


def _archive(name: str) -> str | None:
    return f"{FOLDER}/{ARCHIVE}" if name == f"usr/share/scummvm/{PACKAGE}/{ARCHIVE}" else None


def _write_clip(path: Path, content: bytes) -> None:
    if not path.is_file() or path.stat().st_size != len(content):
        path.write_bytes(content)


def _record(folder: Path, line: Line) -> Record:
    path = folder / f"{line.clip}.mp3"
    seconds = probe_seconds(path)
    if seconds is None or not _SECONDS[0] <= seconds <= _SECONDS[1]:
        raise PrepareError(f"{path}: {seconds} s long; delete {folder} and run again")
    return Record(id=record_id("game", line.clip), audio=(str(path),), task="asr", target=line.text, language="en",
                  speaker=f"game-{line.speaker.replace(' ', '-')}", duration=round(seconds, 4), split=split_of(line))


if __name__ == "__main__":
    run_main(main)
