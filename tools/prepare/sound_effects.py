"""Fetch sound effects with speaking names and write manifests for `caption`, four references a clip.

    python tools/prepare/sound_effects.py
    python tools/prepare/sound_effects.py --skip-wesnoth      # 22 MB instead of 168 MB to download

The sounds are Debian's sonic-pi-samples (CC0), sound-theme-freedesktop (CC BY, CC BY-SA, GPL) and
wesnoth-1.16-data (GPL-2+, CC BY-SA); the captions follow from the file names by the rules of
sound_names.py. Written: caption.{train,dev,test}.jsonl, split by the md5 of the recording's id. Files that
are there already are not fetched again, and the manifests come out the same bytes every time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from debian_packages import Rename, fetch_files
from phone_rules import SPLITS, id_split, record_id
from recipe import PrepareError, recordings_parser, run_main
from sound_names import captions

from listen_dist.data.decode import probe_seconds
from listen_dist.data.manifest import write_manifest
from listen_dist.structures import Record

FOLDER = "sound_effects"
COLLECTIONS = {  # collection: (package, what its sounds' paths begin with)
    "sonic-pi": ("sonic-pi-samples", ("usr/share/sonic-pi/samples/",)),
    "freedesktop": ("sound-theme-freedesktop", ("usr/share/sounds/freedesktop/stereo/",)),
    "wesnoth": (
        "wesnoth-1.16-data",
        tuple(f"usr/share/games/wesnoth/1.16/{place}/" for place in ("data/core/sounds", "sounds")),
    ),
}
SUFFIXES = (".flac", ".oga", ".ogg", ".wav")
MIN_SECONDS, MAX_SECONDS = 0.2, 10.0


def main() -> None:
    """Fetch, then write the manifests."""
    parser = recordings_parser(__doc__)
    parser.add_argument("--skip-wesnoth", action="store_true", help="leave out the biggest package (146 MB)")
    options = parser.parse_args()
    recordings = options.recordings.resolve()
    chosen = [name for name in COLLECTIONS if not (options.skip_wesnoth and name == "wesnoth")]
    fetch_files({COLLECTIONS[name][0]: _rename(name) for name in chosen}, recordings)
    records = find_records(recordings / FOLDER, chosen)
    print(f"{'task':<10}{'split':<7}{'records':>8}{'minutes':>9}{'captions':>10}")
    for split in SPLITS:
        group = [record for record in records if record.split == split]
        write_manifest(options.out.resolve() / f"caption.{split}.jsonl", group)
        minutes = sum(record.duration or 0.0 for record in group) / 60
        distinct = len({reference for record in group for reference in record.references})
        print(f"{'caption':<10}{split:<7}{len(group):>8}{minutes:>9.1f}{distinct:>10}")


def find_records(folder: Path, collections: list[str]) -> list[Record]:
    """Return records of all sounds with a speaking name and a usable length; no recording comes twice."""
    records: list[Record] = []
    seen: set[str] = set()  # some sounds are stored under several names
    for collection in collections:
        for path in sorted((folder / collection).glob("*")):
            references = captions(collection, path.stem)
            seconds = probe_seconds(path) if references else None
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            if seconds and MIN_SECONDS <= seconds <= MAX_SECONDS and content not in seen:
                seen.add(content)
                records.append(_record(collection, path, references, seconds))
    if not records:
        raise PrepareError(f"no sounds below {folder}; delete {folder.parent} and run again")
    return records


def _record(collection: str, path: Path, references: tuple[str, ...], seconds: float) -> Record:
    name = record_id("caption", collection, path.name)  # some stems come with two suffixes
    return Record(
        id=name,
        audio=(str(path),),
        task="caption",
        target=references[0],
        references=references,
        language="en",
        duration=round(seconds, 4),
        split=id_split(name),
        meta={"source": collection},
    )


def _rename(collection: str) -> Rename:
    """Return which files of a collection's package to take: all its sounds, into one flat folder."""

    def rename(name: str) -> str | None:
        path = PurePosixPath(name)
        wanted = name.startswith(COLLECTIONS[collection][1]) and path.suffix in SUFFIXES
        return f"{FOLDER}/{collection}/{path.name}" if wanted else None

    return rename


if __name__ == "__main__":
    run_main(main)
