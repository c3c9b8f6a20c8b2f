"""What the recipes share: command line, first missing file, tables, lengths, manifests and their summary."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from phone_rules import digest
from tqdm import tqdm

from listen_dist.data.decode import JOIN_SILENCE_SECONDS, probe_seconds
from listen_dist.data.manifest import write_manifest
from listen_dist.errors import ListenError
from listen_dist.structures import Record

_CHUNK = 64
"""Files a thread reads the headers of before it reports."""


class PrepareError(ListenError):
    """Data could not be prepared; the first line of the message says what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a recipe; a known error ends it with its message alone, no traceback."""
    try:
        main()
    except (ListenError, OSError) as error:
        sys.exit(f"error: {error}")


def recordings_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the command line of a recipe that fetches its recordings: --out --recordings."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/manifests"), help="folder for the manifests")
    parser.add_argument(
        "--recordings", type=Path, default=Path("assets/recordings"), help="folder for the audio"
    )
    return parser


def recipe_parser(doc: str | None, folder: str) -> argparse.ArgumentParser:
    """Return the command line of a recipe that reads a folder: FOLDER --out --threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("--out", type=Path, default=Path("assets/manifests"), help="folder for the manifests")
    parser.add_argument("--threads", type=int, default=8, help="how many read audio headers (default 8)")
    return parser


def require(path: Path, cure: str) -> Path:
    """Return `path` if it is a file or folder.

    Raises:
        PrepareError: it is missing; the message names it and what to do.
    """
    if not path.exists():
        raise PrepareError(f"{path} is missing: {cure}")
    return path


def read_table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line`, row) of a csv file with a header; `dialect` goes to the csv module.

    Raises:
        PrepareError: a column is missing, a line has more or fewer fields than the header, or it is no csv file.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, **dialect)
        try:
            names = reader.fieldnames or ()
            absent = [name for name in columns if name not in names]
            if absent:
                raise PrepareError(f"{path}:1: no column {absent[0]!r}; found {', '.join(names)}")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():  # too many fields, too few
                    raise PrepareError(f"{place}: not {len(names)} fields; is the file cut short?")
                yield place, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise PrepareError(f"{path}:{reader.line_num + 1}: {error}; download it again") from None


def record_name(prefix: str, name: str) -> str:
    """Return a safe record id; a name that has to be changed or cut keeps a digest, so that it stays unique.

    >>> record_name("asr", "1272-128104-0000")
    'asr-1272-128104-0000'
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if safe != name or len(prefix) + len(name) > 70:
        safe = f"{safe[:50]}-{digest(name) % 16**8:08x}"
    return f"{prefix}-{safe}"


def held_out(name: str, salt: str, one_in: int) -> bool:
    """Tell whether a speaker belongs to the held-out share: a pure function of name and salt."""
    return digest(f"{salt}/{name}") % one_in == 0


def check_apart(splits: dict[str, list[Record]]) -> None:
    """Refuse splits that share a speaker (`a+b` are two).

    Raises:
        PrepareError: naming the speaker and both splits.
    """
    owner: dict[str, str] = {}
    for split, records in splits.items():
        for speaker in {name for record in records for name in record.speaker.split("+")}:
            if owner.setdefault(speaker, split) != split:
                both = f"{owner[speaker]} and in {split}"
                raise PrepareError(f"speaker {speaker} is in {both}: unpack the set again, into an empty folder")


def report(what: str, samples: Sequence[str]) -> None:
    """Print how many samples something happened to, and the first of them; nothing where there are none."""
    if samples:
        print(f"{len(samples)} {what}; the first: {samples[0]}")


def write_splits(name: str, splits: dict[str, list[Record]], options: argparse.Namespace, cure: str) -> None:
    """Measure all audio, write `OUT/name.split.jsonl` and print what is in them.

    Raises:
        PrepareError: a split is empty, or an audio file is missing (the first one is named).
    """
    for split, records in splits.items():
        if not records:
            raise PrepareError(f"{name}.{split} has no samples: {cure}")
    paths = dict.fromkeys(path for records in splits.values() for record in records for path in record.audio)
    seconds = audio_seconds(list(paths), options.threads, cure)
    print(f"{'set':<22}{'split':<16}{'records':>8}{'hours':>9}  answers")
    for split, records in splits.items():
        measured = [replace(record, duration=_duration(record, seconds)) for record in records]
        write_manifest(options.out.resolve() / f"{name}.{split}.jsonl", measured)
        hours = sum(record.duration or 0.0 for record in measured) / 3600
        print(f"{name:<22}{split:<16}{len(measured):>8}{hours:>9.2f}  {_answers(measured)}")


def audio_seconds(paths: Sequence[str], threads: int, cure: str) -> dict[str, float | None]:
    """Return path → seconds by the file's header, None where the header doesn't tell.

    Raises:
        PrepareError: a file is missing; the first in the order of `paths` is named.
    """
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    found: dict[str, float | None] = {}
    pool = ThreadPoolExecutor(threads)
    try:
        with tqdm(total=len(paths), desc="audio headers", unit="file", disable=None) as bar:
            for chunk, lengths in zip(chunks, pool.map(_probe, chunks), strict=True):
                for path, seconds in zip(chunk, lengths, strict=True):
                    if seconds is None:
                        require(Path(path), cure)
                    found[path] = seconds or None  # 0 s: no length that a manifest may state
                bar.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    unknown = [path for path, length in found.items() if length is None]
    report("files whose header tells no length (shard_dataset.py decodes them, or names them as skipped)", unknown)
    return found


def _probe(paths: Sequence[str]) -> list[float | None]:
    return [probe_seconds(path) for path in paths]


def _duration(record: Record, seconds: dict[str, float | None]) -> float | None:
    lengths = [seconds[path] for path in record.audio]
    known = [length for length in lengths if length is not None]
    silence = JOIN_SILENCE_SECONDS * (len(lengths) - 1)
    return round(sum(known) + silence, 4) if len(known) == len(lengths) else None


def _answers(records: list[Record]) -> str:
    """Return the answers with their counts where they are a closed set."""
    if "choices" not in records[0].meta:
        return f"{len({answer for record in records for answer in record.answers})} texts"
    counts = Counter(record.target for record in records)
    return ", ".join(f"{answer} {count}" for answer, count in sorted(counts.items()))
