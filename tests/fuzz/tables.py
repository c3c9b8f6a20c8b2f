"""The tables of every recipe in tools/prepare, on miniatures of the sets."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from listen_dist.errors import ListenError
from tests.fuzz import mutate
from tests.fuzz.cases import Fault, one_line
from tests.recipes import lines, run_recipe, sound

CAPTIONS = ("file_name", *(f"caption_{number}" for number in range(1, 6)))


def prepare(root: Path) -> Path:
    """The folder of miniatures, in the sets' official layouts."""
    sets = root / "sets"
    if not (sets / "ready").exists():
        shutil.rmtree(sets, ignore_errors=True)
        for build in (_clotho, _audiocaps, _covost, _librispeech, _librisqa, _iemocap, _voxceleb):
            build(sets)
        lines(sets / "ready")
    return sets


RECIPES: dict[str, tuple[str, ...]] = {
    "clotho": (),
    "audiocaps": ("--skip-missing",),
    "covost2": (),
    "iemocap": (),
    "voxceleb1": ("--pairs", "4"),
    "librispeech": ("--subsets", "train-clean-360", "test-clean"),
    "librisqa": ("--librispeech", "{}/librispeech"),
}


def case(sets: Path, chance: random.Random, folder: Path) -> str:
    recipe = chance.choice(sorted(RECIPES))
    copy = Path(shutil.copytree(sets / recipe, folder / recipe))
    words = [word.format(sets) for word in RECIPES[recipe]]
    tables = sorted(path for path in copy.rglob("*") if path.suffix in (".csv", ".tsv", ".txt", ".json"))
    table = chance.choice(tables)
    rows = table.read_bytes().count(b"\n") + 1
    table.write_bytes(_damaged(chance, table))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            manifests = run_recipe(recipe, folder / "out", copy, *words)
    except ListenError as error:
        one_line(error, str(folder), f"{recipe}.", f"{recipe}_fold", *words)
        if list((folder / "out").glob("*.jsonl")):
            raise Fault("an error, and a manifest beside it") from error
        return "refused"
    records = [record for group in manifests.values() for record in group]
    for record in records:
        # The questions of LibriSQA, JSON, may have lines.
        if recipe != "librisqa" and any(end in answer for answer in record.answers for end in "\r\n"):
            raise Fault(f"{recipe}: an answer of several lines: the table was misread")
        if any("\0" in text for text in (*record.answers, record.question)):
            raise Fault(f"{recipe}: NUL in a text")
    most = 5 * (rows + sum(path.read_bytes().count(b"\n") + 1 for path in tables)) + 20
    if not records or len(records) > most:
        raise Fault(f"{recipe}: {len(records)} records from some {most // 5} rows")
    return "used"


def _damaged(chance: random.Random, table: Path) -> bytes:
    content = table.read_bytes()
    pick = chance.random()
    if pick < 0.25:
        return mutate.data(chance, content)
    if table.suffix == ".json" and pick < 0.8:
        return mutate.to_json(chance, mutate.tree(chance, json.loads(content)))
    if pick < 0.35:
        return content.replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n", b"\0\n", b"\x0b\n")))
    if pick < 0.45:
        mark = chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b" ", b'"', b"\0"))
        return mark + content if mark != b"\xff\xfe" else content.decode().encode("utf-16")
    text = content.decode()
    separator = "\t" if table.suffix == ".tsv" or "\t" in text else "," if table.suffix == ".csv" else " "
    rows = text.split("\n")
    for _ in range(chance.choice((1, 1, 3))):
        at = chance.randrange(len(rows))
        rows[at] = _other_row(chance, rows[at], separator, rows)
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def _other_row(chance: random.Random, row: str, separator: str, rows: list[str]) -> str:
    fields = row.split(separator)
    at = chance.randrange(len(fields))
    pick = chance.random()
    if pick < 0.4:
        fields[at] = mutate.text(chance)
    elif pick < 0.55:
        place = chance.randrange(len(fields[at]) + 1)
        fields[at] = fields[at][:place] + mutate.text(chance) + fields[at][place:]
    elif pick < 0.7:
        place = chance.choice((0, len(fields[at])))
        fields[at] = fields[at][:place] + chance.choice(('"', "'", "\\", '""', '"\n')) + fields[at][place:]
    elif pick < 0.8:
        del fields[at]
    elif pick < 0.9:
        fields.insert(at, mutate.text(chance))
    else:
        return f"{row}\n{chance.choice(rows)}"
    return separator.join(fields)


# --- miniatures -----------------------------------------------------------------------------------------


def _table(path: Path, *rows: tuple[object, ...], **dialect: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows(rows)


def _clotho(sets: Path) -> None:
    for split in ("development", "validation", "evaluation"):
        names = [f"{split} {number}.wav" for number in range(2)]
        rows = [(name, *(f'A "long", dull {name[:4]} {number}' for number in range(5))) for name in names]
        _table(sets / f"clotho/clotho_captions_{split}.csv", CAPTIONS, *rows)
        for name in names:
            sound(sets / "clotho" / split / name)


def _audiocaps(sets: Path) -> None:
    for split in ("train", "val", "test"):
        rows = [
            (10 + number, f"-v{split}{number // 2}", 30 * number, f"A dog barks, {number} times") for number in range(3)
        ]
        _table(sets / f"audiocaps/{split}.csv", ("audiocap_id", "youtube_id", "start_time", "caption"), *rows)
        for _, video, start, _ in rows:
            sound(sets / f"audiocaps/audio/{split}/{video}_{start}.wav")


def _covost(sets: Path) -> None:
    for number, split in enumerate(("train", "dev", "test")):
        clips = [f"common_voice_en_{10 * number + clip}" for clip in range(3)]
        rows = [f'{clip}.mp3\t"Well," she said.\t好的{clip[-1]}\tspeaker{clip}' for clip in clips]
        lines(sets / f"covost2/covost_v2.en_zh-CN.{split}.tsv", "path\tsentence\ttranslation\tclient_id", *rows)
        for clip in clips:
            sound(sets / f"covost2/clips/{clip}.mp3")


def _librispeech(sets: Path) -> None:
    for subset, name in (("train-clean-360", "103-1240"), ("train-clean-360", "126-7"), ("test-clean", "1089-134686")):
        place = sets / "librispeech" / subset / name.replace("-", "/")
        lines(place / f"{name}.trans.txt", *(f"{name}-{number:04d} THE LAW {number}" for number in range(3)))
        for number in range(3):
            sound(place / f"{name}-{number:04d}.flac")


def _librisqa(sets: Path) -> None:
    for part in ("PartI", "PartII"):
        for split, names in (("train", ("103-1240", "126-7")), ("test", ("1089-134686",))):
            asked = (
                {"question": "What?", "answer": "The law."}
                if part == "PartI"
                else {"question_and_option": "Question: Who?\nOptions:\nA. He.\nB. She.", "answer": "B"}
            )
            entries = [
                {"speech_path": f"x/{name}-{number:04d}.flac", "text": "t", **asked}
                for name in names
                for number in range(3)
            ]
            path = sets / f"librisqa/LibriSQA-{part}/LibriSQA-{part}-{split}.json"
            lines(path, json.dumps(entries, indent=1))


def _iemocap(sets: Path) -> None:
    for session in range(1, 6):
        stem = f"Ses0{session}F_impro01"
        rows = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for number, label in enumerate(("neu", "exc", "xxx", "ang")):
            turn = f"{stem}_{'FM'[number % 2]}{number:03d}"
            rows += [
                f"[{6.2901 + number:.4f} - {8.2357 + number:.4f}]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]",
                "C-E2:\tNeutral;\t()",
                "",
            ]
            sound(sets / f"iemocap/Session{session}/sentences/wav/{stem}/{turn}.wav")
        lines(sets / f"iemocap/Session{session}/dialog/EmoEvaluation/{stem}.txt", *rows)


def _voxceleb(sets: Path) -> None:
    clips = [
        f"id{speaker}/v{video}/00001.wav"
        for speaker in (10001, 10002, 10034, 10100, 10270, 10271)
        for video in range(2)
    ]
    for clip in clips:
        sound(sets / "voxceleb1/wav" / clip, 0.02)
    test = clips[-4:]
    lines(
        sets / "voxceleb1/veri_test2.txt", f"1 {test[0]} {test[1]}", f"0 {test[0]} {test[2]}", f"1 {test[2]} {test[3]}"
    )
