#!/usr/bin/env python3
"""Fetch English recordings of people and words that are in no training set, and write a test manifest for `asr`.

    python tools/prepare/other_speech.py
    python tools/prepare/other_speech.py --out /data/manifests --recordings /data/recordings

The names of animals (Debian's tuxpaint-stamps-default, 160 MB to download), and playing cards and sentences of an
audiobook (pocketsphinx-testdata). Written: asr_other.test.jsonl; `meta.kind` says where a clip is from. Files that
are there already are not fetched again, and the manifest comes out the same bytes every time.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import soundfile
from debian_packages import fetch_files
from phone_rules import record_id
from recipe import PrepareError, recordings_parser, run_main

from listen_dist.data.manifest import write_manifest
from listen_dist.structures import Record

FOLDER = "other_speech"
STAMPS, SPHINX = "usr/share/tuxpaint/stamps/animals/", "usr/share/pocketsphinx/test/data/"
READINGS = {"cards": "cards/cards.transcription", "librivox": "librivox/transcription"}


def main() -> None:
    """Fetch, then write the manifest."""
    options = recordings_parser(__doc__).parse_args()
    recordings = options.recordings.resolve()
    fetch_files({"tuxpaint-stamps-default": _stamp, "pocketsphinx-testdata": _reading}, recordings)
    records = [*animals(recordings / FOLDER / "animals"), *readings(recordings / FOLDER)]
    write_manifest(options.out.resolve() / "asr_other.test.jsonl", records)
    seconds = sum(record.duration or 0.0 for record in records)
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(r.meta["kind"] for r in records).items())
    print(f"asr_other.test: {len(records)} clips, {seconds:.0f} s: {kinds}")


def _stamp(name: str) -> str | None:
    """Descriptions without a language in their name are English, as the first line of the text is."""
    inside = name.removeprefix(STAMPS)
    taken = inside != name and (name.endswith("_desc.ogg") or name.endswith(".txt"))
    return f"{FOLDER}/animals/{inside.replace('/', '-')}" if taken else None


def _reading(name: str) -> str | None:
    inside = name.removeprefix(SPHINX)
    taken = inside.split("/")[0] in READINGS and (name.endswith(".wav") or name.endswith("transcription"))
    return f"{FOLDER}/{inside}" if inside != name and taken else None


def animals(folder: Path) -> list[Record]:
    """Animals' names where the file's name and the text beside it agree; they are said without the text's article."""
    records = []
    for path in sorted(folder.glob("*_desc.ogg")):
        name = path.name.removesuffix("_desc.ogg")
        text = path.with_name(f"{name}.txt")
        line = text.read_text(encoding="utf-8").partition("\n")[0] if text.is_file() else ""
        said = re.sub(r"^An? |\.$", "", line.strip())
        if said and said == name.rsplit("-")[-1]:
            records.append(_record(path, "animals", said))
    return records


def readings(folder: Path) -> list[Record]:
    """What Sphinx's transcription files name: `<s> words </s> (file)`.

    Raises:
        PrepareError: a line of another form.
    """
    records = []
    for kind, transcription in READINGS.items():
        for line in (folder / transcription).read_text(encoding="utf-8").strip().split("\n"):
            found = re.fullmatch(r"<s> (.+?) *</s> \((\S+)\)", line.strip())
            if not found:
                raise PrepareError(f"{folder / transcription}: no transcription: {line!r}")
            records.append(_record(folder / kind / f"{found[2]}.wav", kind, found[1]))
    return records


def _record(path: Path, kind: str, text: str) -> Record:
    return Record(
        id=record_id("other", kind, path.stem.removesuffix("_desc")),
        audio=(str(path),),
        task="asr",
        target=text,
        language="en",
        duration=round(soundfile.info(path).duration, 4),
        split="test",
        meta={"kind": kind},
    )


if __name__ == "__main__":
    run_main(main)
