"""What the recipes share: command line, first missing file, tables, lengths, manifests and their summary."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from phone_rules import digest
from tqdm import tqdm

from listen_dist import exits
from listen_dist.command_line import user_path
from listen_dist.data.decode import JOIN_SILENCE_SECONDS, probe_seconds
from listen_dist.data.manifest import checked, write_manifest
from listen_dist.errors import ListenError
from listen_dist.structures import Record

_CHUNK = 64
"""Files a thread reads the headers of before it reports."""
_LINE_ENDS = re.compile("[\v\f\x1c-\x1e\x85\u2028\u2029]")
_OPEN_QUOTE = "a quote opens a field here that does not end on its line"


class PrepareError(ListenError):
    """Data could not be prepared; the first line of the message says what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a recipe and end the program."""
    sys.exit(exits.run(main))


def recordings_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the command line of a recipe that fetches its recordings: --out --recordings."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default=Path("assets/manifests"), help="folder for the manifests")
    parser.add_argument(
        "--recordings", type=user_path, default=Path("assets/recordings"), help="folder for the audio"
    )
    return parser


def recipe_parser(doc: str | None, folder: str) -> argparse.ArgumentParser:
    """Return the command line of a recipe that reads a folder: FOLDER --out --threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help=folder)
    parser.add_argument("--out", type=user_path, default=Path("assets/manifests"), help="folder for the manifests")
    parser.add_argument("--threads", type=int, default=8, help="how many read audio headers (default 8)")
    return parser


def require(path: Path, cure: str) -> Path:
    """Return `path` if it is a file or folder.

    Raises:
        PrepareError: it is missing; the message names it and what to do.
    """
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that no file can have
        raise PrepareError(f"{str(path)[:200]}: {error.strerror}: {cure}") from None
    raise PrepareError(f"{path} is missing: {cure}")


def text_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file.

    A line ends at a line feed, CRLF too. A byte order mark is dropped. What other programs take for a line's end
    (U+2028, a vertical tab …) becomes a space, so that no text of a manifest breaks them.

    Raises:
        PrepareError: `file:line` that is not UTF-8, or holds NUL or a lone carriage return.
    """
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8", errors)
            except UnicodeDecodeError as error:
                raise PrepareError(f"{path}:{number}: not UTF-8 ({error.reason}); download it again") from None
            line = line.removesuffix("\n").removesuffix("\r")
            if "\0" in line or "\r" in line:
                found = "NUL bytes" if "\0" in line else "a carriage return"
                raise PrepareError(f"{path}:{number}: {found} within a line; is the file damaged? download it again")
            yield number, one_line(line)


def one_line(text: str) -> str:
    """Return `text` with a space for every character besides a line feed that some programs end a line at."""
    return _LINE_ENDS.sub(" ", text)


def read_table(path: Path, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`file:line` where it begins, row) of a csv file with a header; `dialect` goes to the csv module.

    Raises:
        PrepareError: a column is missing, a line has more or fewer fields than the header, a quote is not closed on
            its line (the rows up to the next quote would be one text), or it is no csv file.
    """
    reader = csv.reader((f"{line}\n" for _, line in text_lines(path)), strict=True, **dialect)
    names: list[str] = []
    start = 1
    try:
        for row in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if any("\n" in field for field in row):
                raise PrepareError(f"{place}: {_OPEN_QUOTE}")
            if not names:
                names = row
                absent = [name for name in columns if name not in names]
                if absent:
                    raise PrepareError(f"{place}: no column {absent[0]!r}; found {', '.join(names)}")
            elif row:
                if len(row) != len(names):
                    raise PrepareError(f"{place}: not {len(names)} fields but {len(row)}; is the file cut short?")
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        is_open = reader.line_num > start or "unexpected end" in str(error)
        cause = _OPEN_QUOTE if is_open else error
        raise PrepareError(f"{path}:{start}: {cause}; mend the line, or download it again") from None
    if not names:
        raise PrepareError(f"{path}: empty; download it again")


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
        PrepareError: as `write_all`.
    """
    write_all({(name, split): records for split, records in splits.items()}, options, cure)


def write_all(sets: dict[tuple[str, str], list[Record]], options: argparse.Namespace, cure: str) -> None:
    """The same of several sets, by name and split; nothing is written unless all is right.

    Raises:
        PrepareError: a split is empty, or an audio file is missing (the first one is named).
    """
    for (name, split), records in sets.items():
        if not records:
            raise PrepareError(f"{name}.{split} has no samples: {cure}")
    paths = dict.fromkeys(path for records in sets.values() for record in records for path in record.audio)
    seconds = audio_seconds(list(paths), options.threads, cure)
    for (name, split), records in sets.items():
        deque(checked(records, f"{name}.{split}"), maxlen=0)
    print(f"{'set':<22}{'split':<16}{'records':>8}{'hours':>9}  answers")
    for (name, split), records in sets.items():
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
