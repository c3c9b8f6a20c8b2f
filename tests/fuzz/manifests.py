"""Manifests, predictions and other JSON lines of odd text, types, depths and encodings."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import Prediction, read_predictions, take_over
from listen_dist.evaluation.scoring import score_task
from listen_dist.tasks import TASKS
from tests.fuzz import mutate
from tests.fuzz.audio import OPTIONS, shard_build, verify_all
from tests.fuzz.cases import Fault, one_line

HEADER = {"split": "test", "k": 4, "decoding": {"beams": 1}}


@dataclass(frozen=True)
class World:
    audio: Path


def prepare(root: Path) -> World:
    audio = root / "manifest-audio"
    audio.mkdir(exist_ok=True)
    for name in "ab":
        soundfile.write(audio / f"{name}.wav", np.random.default_rng(ord(name)).uniform(-0.3, 0.3, 8000), 16000)
    return World(audio)


def case(here: World, chance: random.Random, folder: Path) -> str:
    what: Callable[[World, random.Random, Path], str] = chance.choice(
        (_manifest, _manifest, _manifest, _predictions, _partial)
    )
    return what(here, chance, folder)


def _manifest(here: World, chance: random.Random, folder: Path) -> str:
    """Read it; what is read can be written and read again, and shards can be built from it."""
    path = folder / chance.choice(("m.jsonl", "m.test.jsonl", "é m.jsonl"))
    path.write_bytes(_lines(chance, [_record(here, chance, number) for number in range(chance.randrange(1, 5))]))
    try:
        records = list(read_manifest(path))
    except ListenError as error:
        one_line(error, str(path))
        return "refused"
    write_manifest(folder / "again.jsonl", records)
    if [record.id for record in read_manifest(folder / "again.jsonl")] != [record.id for record in records]:
        raise Fault("written again, it is another manifest")
    if chance.random() < 0.7:
        return "used"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            (index,) = shard_build.build({folder / "out": [path]}, OPTIONS, workers=1, overwrite=False)
            verify_all(index, 30.0)
    except ListenError as error:
        one_line(error, str(path), str(folder / "out"))
        return "refused"
    if index.samples + index.skipped != len(records):
        raise Fault("a record is neither in a shard nor skipped")
    return "sharded"


def _record(here: World, chance: random.Random, number: int) -> Any:
    task = chance.choice(("asr", "asr", "caption", "speech_qa", "language_id", "speaker_verification"))
    fields: dict[str, Any] = {
        "id": f"r{number}",
        "audio": str(here.audio / "a.wav"),
        "task": task,
        "target": "yes",
        "language": "en",
        "duration": 0.5,
        "speaker": "s",
        "split": "train",
        "meta": {"n": [1, {"x": "y"}]},
    }
    if task == "caption":
        fields["references"] = ["a dog", "a cat"]
    if task in ("speech_qa", "language_id"):
        fields |= {"question": "Is it?", "meta": {"choices": ["yes", "no"]}}
    if task == "speaker_verification":
        fields["audio"] = [str(here.audio / "a.wav"), str(here.audio / "b.wav")]
    if chance.random() < 0.5:
        fields["target"] = mutate.text(chance) + chance.choice(("", "x"))
    return mutate.tree(chance, fields) if chance.random() < 0.6 else fields


def _lines(chance: random.Random, rows: list[Any]) -> bytes:
    """Rows as JSON lines of some line end, and then perhaps a mark, NUL, garbage or a cut."""
    end = chance.choice((b"\n",) * 6 + (b"\r\n", b"\r", b"\n\n", b" \n", b"\0\n", b",\n"))
    encode = mutate.to_json if chance.random() < 0.3 else lambda _, row: json.dumps(row).encode()
    content = end.join(encode(chance, row) for row in rows) + (end if chance.random() < 0.8 else b"")
    pick = chance.random()
    if pick < 0.1:
        content = (
            chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n\n", b"[", b"#!", b"PAR1", b"\x1f\x8b")) + content
        )
    elif pick < 0.15:
        content = json.dumps(rows, indent=1).encode()
    elif pick < 0.18:
        content += chance.choice((b"[", b'{"a":')) * chance.choice((500, 5000, 100_000, 1_100_000)) + end
    elif pick < 0.2:
        content += b'{"id": "r", "duration": ' + b"9" * chance.choice((400, 5000, 100_000)) + b"}" + end
    elif pick < 0.3:
        content = mutate.data(chance, content)
    return content


def _prediction(chance: random.Random, number: int) -> Any:
    row = {
        "id": f"p{number}",
        "task": chance.choice(sorted(TASKS)),
        "text": mutate.text(chance).replace("\ud800", ""),
        "answers": ["yes"],
        "prompts": [1, 2],
        "scores": [0.5, 0.25],
        "choices": ["yes", "no"],
        "likelihoods": [-1.0, -2.0],
    }
    return mutate.tree(chance, row) if chance.random() < 0.6 else row


def _predictions(_: World, chance: random.Random, folder: Path) -> str:
    """Read predictions and score what is read."""
    path = folder / "predictions.jsonl"
    path.write_bytes(_lines(chance, [_prediction(chance, number) for number in range(chance.randrange(1, 5))]))
    try:
        rows = read_predictions(path)
    except ListenError as error:
        one_line(error, str(path))
        return "refused"
    return _score(rows)


def _partial(_: World, chance: random.Random, folder: Path) -> str:
    """Take over what an interrupted evaluation left."""
    header = mutate.tree(chance, HEADER) if chance.random() < 0.3 else HEADER
    (folder / "header.json").write_bytes(
        _lines(chance, [header]) if chance.random() < 0.3 else json.dumps(header).encode()
    )
    for rank in range(2):
        rows = [
            {"set": "s", **row} if isinstance(row, dict) else row
            for row in (_prediction(chance, 9 * rank + number) for number in range(3))
        ]
        (folder / f"rank-{rank}.jsonl").write_bytes(_lines(chance, rows))
    try:
        done = take_over(folder, HEADER)
    except ListenError as error:
        one_line(error, str(folder))
        return "refused"
    if take_over(folder, HEADER) != done:
        raise Fault("taken over twice, it is not the same")
    return "used"


def _score(rows: list[Prediction]) -> str:
    by_task: dict[str, list[Prediction]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    for task, group in by_task.items():
        with contextlib.suppress(ListenError):
            figures = score_task(task, group, java=False).figures
            if not figures:
                raise Fault("scored without a figure")
    return "used"
