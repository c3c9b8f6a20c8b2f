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
        earlier = _object(known.read_text(encoding="utf-8", errors="replace"))
        if earlier is None:
            logger.warning("%s: damaged, so nobody knows what the partial results depend on; decoding all again", known)
            for file in files:
                file.unlink()
            files = []
        earlier = earlier or header
        differing = sorted(key for key in {*earlier, *header} if earlier.get(key) != header.get(key))
        if differing:
            raise ListenError(f"{folder}: holds an interrupted evaluation that differs in {', '.join(differing)}; "
                             "finish it with the same settings, choose another --out, or delete that folder")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(filter(None, lines), 1):
            row = _finished(line)
            if row is None:  # a kill leaves half a line, a lost node one of NULs
                logger.warning("%s:%d: damaged, dropped; its sample is decoded again", file, number)
            else:
                rows[row["set"], row["id"]] = row
    write_file(folder / "rank-0.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    for file in files:
        if file.name != "rank-0.jsonl":
            file.unlink()
    write_file(known, json.dumps(header, indent=1))
    done: dict[str, list[Prediction]] = defaultdict(list)
    for (fingerprint, _), row in rows.items():
        done[fingerprint].append(prediction_from(row))
    return done


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object; None where the text is something else."""
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _finished(line: str) -> dict[str, Any] | None:
    """The fields of a finished prediction and its set; None where the line is damaged."""
    row = _object(line)
    try:
        if row is None or not isinstance(row["set"], str) or not isinstance(prediction_from(row).id, str):
            return None
    except (ListenError, KeyError):
        return None
    return row


def clear(folder: Path) -> None:
    """Drop the partial results of a split whose results are written."""
    shutil.rmtree(folder, ignore_errors=True)


def prediction_from(tree: dict[str, Any]) -> Prediction:
    """A prediction from its JSON fields; others (`set`) are passed over.

    Raises:
        ListenError: missing fields.
    """
    known = {item.name for item in fields(Prediction)}
    try:
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                  for key, value in tree.items() if key in known}
        return Prediction(**values)
    except (TypeError, AttributeError) as error:
        raise ListenError(f"not a prediction ({error}): {str(tree)[:80]}") from None


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file that `evaluate.py` wrote.

    Raises:
        FileNotFoundError: no such file.
        ListenError: a line is no prediction; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no predictions here; run evaluate.py first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                rows.append(prediction_from(json.loads(line)))
            except (ListenError, ValueError) as error:
                raise ListenError(f"{path}:{number}: {error}") from None
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
