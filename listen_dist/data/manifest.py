"""Manifests: one JSON object a line, one line a sample. Read with every error named by file and line.

The same checks serve the `<id>.json` members of shards, which are records without audio paths.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from listen_dist.errors import ListenError
from listen_dist.structures import Record
from listen_dist.tasks import NOTHING_SAID, check_answers, choices_for, get_task, instruction_for

MAX_LINE_BYTES = 1 << 20
"""A longer line is refused before it is parsed."""
MAX_DEPTH = 8
"""Nested lists and objects in `meta`."""

# No dot: webdataset takes everything before the first dot of a member's name as the sample's key.
# 80 characters keep `<id>.speech.npy` within a plain ustar header.
ID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_OTHER_FORMATS = {b"PAR1": "a parquet file", b"\x1f\x8b": "a gzip file (unpack it)",
                  b"PK\3\4": "a zip file (unpack it)", b"\xff\xfe": "UTF-16 text (write it as UTF-8)",
                  b"\xfe\xff": "UTF-16 text (write it as UTF-8)"}

_TEXT_KEYS = ("id", "task", "target", "instruction", "question", "language", "speaker", "split")
_KEYS = (*_TEXT_KEYS, "audio", "references", "duration", "meta")


class ManifestError(ListenError):
    """A record that can't be used; the message names the key and the cure, and where it stands."""


def read_manifest(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yield the records of a manifest, in file order.

    Relative audio paths are taken relative to the manifest's folder. Empty lines are skipped.

    Raises:
        ManifestError: the message starts with `file:line:` and names the key and the cure.
    """
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder; name the manifest in it (a .jsonl file)")
    first_line: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in _numbered_lines(path, file):
            try:
                record = record_from_json(line)
                if record.id in first_line:
                    earlier = first_line[record.id]
                    raise ManifestError(
                        f"key 'id': {record.id!r} stands in line {earlier} too; ids are unique"
                    )
            except ListenError as error:
                raise ManifestError(f"{path}:{number}: {error}") from None
            first_line[record.id] = number
            yield _with_absolute_audio(record, path.parent)


def write_manifest(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write records as JSON lines (under a temporary name, then renamed); return how many.

    Audio paths are written relative to the manifest's folder, so that the tree can be moved.

    Raises:
        ManifestError: a record that `read_manifest` would refuse.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_file(path) as file:
        for record in checked(records, str(path)):
            fields = record_to_dict(record)
            audio = [os.path.relpath(a, path.parent) if os.path.isabs(a) else a for a in record.audio]
            fields["audio"] = audio[0] if len(audio) == 1 else audio
            file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def checked(records: Iterable[Record], where: str) -> Iterator[Record]:
    """Pass records on that `read_manifest` would take.

    Raises:
        ManifestError: naming `where` and the record's id.
    """
    seen: set[str] = set()
    for record in records:
        try:
            record_from_dict(record_to_dict(record))
        except ListenError as error:
            raise ManifestError(f"{where}: {record.id!r}: {error}") from None
        if record.id in seen:
            raise ManifestError(f"{where}: id {record.id!r} comes twice")
        seen.add(record.id)
        yield record


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; when the block ends well, sync it and rename it to `path`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which other users of a shared disk can't read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_from_json(text: bytes, need_audio: bool = True) -> Record:
    """Parse and check one record.

    Raises:
        ManifestError: too long, not UTF-8, not JSON, or what `record_from_dict` refuses.
    """
    if len(text) > MAX_LINE_BYTES:
        raise ManifestError(f"longer than {MAX_LINE_BYTES} bytes; one record is one short line")
    if b"\0" in text:
        raise ManifestError("not JSON: holds NUL bytes, as after a crash while it was written; write it again")
    try:
        fields = _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ManifestError(f"not UTF-8 at byte {error.start}; write the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"not JSON: {error.msg} at column {error.colno}; one JSON object a line"
        ) from None
    except (RecursionError, ValueError) as error:  # Python reads no number of more than 4,300 digits
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise ManifestError(f"not JSON that we read: {what}") from None
    return record_from_dict(fields, need_audio)


def record_from_dict(fields: object, need_audio: bool = True) -> Record:
    """Check the fields of one record and build it.

    Raises:
        ManifestError: the message names the key and what is expected there.
    """
    if not isinstance(fields, dict):
        raise ManifestError(f"expected a JSON object, found {type(fields).__name__}")
    _check_keys(fields, need_audio)
    for key in _TEXT_KEYS:
        if not _is_text(fields.get(key, "")):
            raise ManifestError(f"key {key!r}: expected text, found {fields[key]!r:.80}")
    audio = _strings(fields, "audio") if need_audio else ()
    references = _strings(fields, "references")
    record = Record(
        **{key: fields[key] for key in _TEXT_KEYS if key in fields},
        audio=audio,
        references=references,
        duration=_duration(fields.get("duration")),
        meta=_meta(fields.get("meta", {})),
    )
    _check_record(record, need_audio)
    return record


def record_to_dict(record: Record) -> dict[str, Any]:
    """Return the JSON fields of a record, empty ones left out, in a fixed order."""
    fields: dict[str, Any] = {
        "id": record.id,
        "audio": record.audio[0] if len(record.audio) == 1 else list(record.audio),
        "task": record.task,
        "target": record.target,
        "references": list(record.references),
        "instruction": record.instruction,
        "question": record.question,
        "language": record.language,
        "speaker": record.speaker,
        "duration": record.duration,
        "split": record.split,
        "meta": record.meta,
    }
    return {key: value for key, value in fields.items() if value not in ("", [], {}, None)}


def is_no_speech(record: Record) -> bool:
    """Whether the record says that its clip holds no speech: then, and for `asr` alone, the right answer is no text.

    Its target is EOS alone, and any word said counts as an insertion. Without the mark an empty target is a mistake.
    """
    return record.task == "asr" and record.meta.get("no_speech") is True


def check_id(name: str) -> str:
    """Return `name` if it is safe as a file name and as a WebDataset key.

    Raises:
        ManifestError: otherwise.
    """
    if not ID_PATTERN.fullmatch(name):
        raise ManifestError(
            f"key 'id': {name[:100]!r} is not a safe name; use up to 80 letters, digits, '_' and '-'"
            " (no dot, slash or space, no '-' in front)"
        )
    return name


def _numbered_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of non-empty lines; a long line is refused before it is read whole."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if reason := _other_format(line):
                raise ManifestError(f"{path}: {reason}; a manifest is JSON lines: one JSON object a line and sample, "
                                    'such as {"id": "a1", "audio": "a.wav", "task": "asr", "target": "hello"}')
        if len(line) > MAX_LINE_BYTES:
            raise ManifestError(
                f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes; a record is short"
            )
        if line.strip():
            yield number, line


def _other_format(line: bytes) -> str:
    """What a file that begins with this line is, where it is no JSON lines as people know them by name; else empty."""
    for start, name in _OTHER_FORMATS.items():
        if line.startswith(start):
            return f"this is {name}"
    text = line.strip()
    if text in (b"[", b"[{") or text.startswith(b"[{"):
        return "this is one JSON list"
    if text == b"{":
        return "this is JSON over several lines"
    is_table = any(sign in text for sign in (b"\t", b",", b";")) and text[:1] not in b"{["
    return "this looks like a table (csv or tsv)" if is_table else ""


def _with_absolute_audio(record: Record, folder: Path) -> Record:
    audio = tuple(str(Path(os.path.abspath(folder / name))) for name in record.audio)
    return Record(**{**record.__dict__, "audio": audio})


def _check_keys(fields: dict[str, Any], need_audio: bool) -> None:
    for key in fields:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "put what is your own into 'meta'"
            raise ManifestError(f"unknown key {key[:80]!r}: {hint}")
    for key in ("id", "audio", "task") if need_audio else ("id", "task"):
        if not fields.get(key):
            raise ManifestError(f"key {key!r} is missing or empty; every record needs it")


def _check_record(record: Record, need_audio: bool) -> None:
    check_id(record.id)
    try:
        get_task(record.task)
    except ListenError as error:
        raise ManifestError(f"key 'task': {error}") from None
    if is_no_speech(record) and (said := "".join(record.answers).strip()):
        raise ManifestError(f"key 'meta': no_speech is true, but key 'target' says {said!r:.80}")
    if record.answers == NOTHING_SAID and not is_no_speech(record):
        raise ManifestError("key 'target' is empty and there are no 'references'; give the right answer (or, for asr "
                            "where nothing is said, meta.no_speech: true)")
    check_answers(record.task, record.answers)
    instruction_for(record)
    if not need_audio:  # a shard's record: the rest was checked when it was written
        return
    wanted = 2 if record.task == "speaker_verification" else 1
    if len(record.audio) != wanted:
        raise ManifestError(
            f"key 'audio': task {record.task!r} needs {wanted} path(s), found {len(record.audio)}"
        )
    for name in record.audio:
        if "://" in name:
            raise ManifestError(f"key 'audio': {name!r:.200} is an address; download it first, and name the file")
    choices_for(record)


def _is_text(value: object) -> bool:
    """Tell whether a JSON value is text that can be written again (JSON can spell lone surrogates and NUL)."""
    return isinstance(value, str) and not _NO_TEXT.search(value)


def _strings(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key, [])
    values = [value] if isinstance(value, str) and key == "audio" else value
    if not isinstance(values, list) or not all(item and _is_text(item) for item in values):
        raise ManifestError(f"key {key!r}: expected a list of non-empty texts")
    return tuple(values)


def _duration(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:
        raise ManifestError(f"key 'duration': expected seconds above 0, found {value!r:.80}")
    return float(value)


def _meta(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ManifestError(f"key 'meta': expected an object, found {type(value).__name__}")
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for node in level if isinstance(node, dict | list) for item in _children(node)]
    if level:
        raise ManifestError(f"key 'meta': nested deeper than {MAX_DEPTH} levels")
    return value


def _children(node: dict[str, object] | list[object]) -> list[object]:
    return list(node.values()) if isinstance(node, dict) else node


def _refuse_constant(name: str) -> object:
    raise ManifestError(f"not JSON: {name} is no number that JSON knows")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # `json.loads` would make one for each record
