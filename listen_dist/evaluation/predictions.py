"""Predictions, and the files that hold them.

While a split is decoded, every rank appends what it has finished to a file of its own,

    partial.<split>/header.json     what the texts depend on: checkpoint, data, decoding
    partial.<split>/rank-0.jsonl    one prediction a line

so that a restart with the same header, on any number of ranks, goes on where all ranks were stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from listen_dist.errors import ListenError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """One decoded sample."""

    id: str
    task: str
    text: str
    answers: tuple[str, ...]
    prompts: tuple[int, ...]
    """Indices of the prompts picked, best first."""
    scores: tuple[float, ...]
    choices: tuple[str, ...] = ()
    """The closed set that the answer should come from; empty where there is none."""
    likelihoods: tuple[float, ...] = ()
    """log p(choice and EOS | input) of each, where `text` was chosen so; empty where it was generated."""
    language: str = ""
    """Of the record; empty where it doesn't say."""
    ended: str = ""
    """What ended a generated answer: `eos`, `line` (the model went on after a line's end; that is not in `text`) or
    `limit` (of tokens); empty where it was chosen."""


@dataclass(frozen=True)
class _Finished(Prediction):
    """A line of partial results."""

    set: str = ""
    """Fingerprint of the set that the sample is from."""


_PREDICTION, _FINISHED, _HEADER = TypeAdapter(Prediction), TypeAdapter(_Finished), TypeAdapter(dict[str, Any])


class PartialFile:
    """One rank's file of finished predictions, safe to kill at any moment."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = (folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8")

    def add(self, fingerprint: str, predictions: Sequence[Prediction]) -> None:
        """Append finished predictions of a set; they are on disk when it returns."""
        self._file.write("".join(json.dumps({"set": fingerprint, **asdict(row)}, ensure_ascii=False) + "\n"
                                 for row in predictions))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def take_over(folder: Path, header: dict[str, Any]) -> dict[str, list[Prediction]]:
    """What an interrupted evaluation with the same header left, by the set's fingerprint.

    One rank alone calls it, before any appends. The files of all its ranks become one, so that the number
    of ranks may change.

    A damaged line is dropped, and its sample decoded again; without a readable header all are.

    Raises:
        ListenError: the folder holds the results of another evaluation.
    """
    known = folder / "header.json"
    header = json.loads(json.dumps(header))  # as it reads back
    files = sorted(folder.glob("rank-*.jsonl"))
    if known.is_file():
        earlier = _header(known)
        if earlier is None:
            logger.warning("%s: damaged, so nobody knows what the partial results depend on; decoding all again", known)
            for file in files:
                file.unlink()
            files = []
        earlier = earlier or header
        differing = sorted(key for key in {*earlier, *header} if earlier.get(key) != header.get(key))
        if differing:
            names = " ".join(", ".join(differing).split())
            raise ListenError(f"{folder}: holds an interrupted evaluation that differs in {names}; "
                             "finish it with the same settings, choose another --out, or delete that folder")
    rows: dict[tuple[str, str], _Finished] = {}
    for file in files:
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                row = _FINISHED.validate_json(line, strict=True)
            except ValidationError:  # a kill leaves half a line, a lost node one of NULs
                logger.warning("%s:%d: damaged, dropped; its sample is decoded again", file, number)
                continue
            rows[row.set, row.id] = row
    write_file(folder / "rank-0.jsonl", to_lines(rows.values()))
    for file in files:
        if file.name != "rank-0.jsonl":
            file.unlink()
    write_file(known, json.dumps(header, indent=1))
    done: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows.values():
        done[row.set].append(Prediction(**{item.name: getattr(row, item.name) for item in fields(Prediction)}))
    return done


def _header(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file holds something else."""
    try:
        return _HEADER.validate_json(file.read_bytes())
    except ValidationError:
        return None


def clear(folder: Path) -> None:
    """Drop the partial results of a split whose results are written."""
    shutil.rmtree(folder, ignore_errors=True)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file that `evaluate.py` wrote.

    Raises:
        FileNotFoundError: no such file.
        ListenError: a line is no prediction; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no predictions here; run evaluate.py first")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            try:
                rows.append(_PREDICTION.validate_json(line, strict=True))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise ListenError(f"{path}:{number}: not a prediction ({where + ': ' if where else ''}{first['msg']}): "
                                  f"{line[:80].decode(errors='replace')!r}; evaluate again") from None
    return rows


def to_lines(rows: Iterable[Any]) -> str:
    """Dataclasses as JSON lines."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def write_file(path: Path, text: str) -> None:
    """Beside its place first, then renamed, so that no half file is ever read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
