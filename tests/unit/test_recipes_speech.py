"""The recipes of LibriSpeech, LibriSQA and CoVoST 2 on miniatures in the sets' official layouts."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from listen_dist.data.shards import ShardIndex
from listen_dist.structures import Record
from listen_dist.tasks import choices_for
from tests.recipes import TOOLS, Damage, edit, error_of, lines, remove, run_recipe, sound

SUBSETS = ("train-clean-100", "dev-clean", "test-clean")
TRAIN = "train-clean-100/103/1240"
TRANSCRIPTS = "test-clean/1089/134686/1089-134686.trans.txt"


def run_tool(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)


def chapter(folder: Path, subset: str, name: str, *texts: str) -> None:
    """Write a chapter of LibriSpeech; `name` is `speaker-chapter`."""
    place = folder / subset / name.replace("-", "/")
    rows = [f"{name}-{number:04d} {text}" for number, text in enumerate(texts)]
    lines(place / f"{name}.trans.txt", *rows)
    for number in range(len(texts)):
        sound(place / f"{name}-{number:04d}.flac", 0.25 + 0.125 * number)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "LibriSpeech"
    for name in ("README.TXT", "SPEAKERS.TXT", "CHAPTERS.TXT", "BOOKS.TXT", "LICENSE.TXT"):
        lines(folder / name, "; as in the archives")
    chapter(folder, "train-clean-100", "103-1240", "CHAPTER ONE", "THAT HAD ITS SOURCE")
    chapter(folder, "train-clean-100", "103-1241", "WE'LL SEE")
    chapter(folder, "train-clean-100", "1034-121119", "THE LAW")
    chapter(folder, "dev-clean", "1272-128104", "MISTER QUILTER IS THE APOSTLE OF THE MIDDLE CLASSES")
    chapter(folder, "test-clean", "1089-134686", "HE HOPED THERE WOULD BE STEW", "STUFF IT INTO YOU")
    return folder


def test_librispeech_record_by_record(librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = run_recipe("librispeech", tmp_path / "m", librispeech, "--subsets", *SUBSETS)
    assert list(manifests) == ["librispeech.dev-clean", "librispeech.test-clean", "librispeech.train-clean-100"]
    train = manifests["librispeech.train-clean-100"]
    assert [record.id for record in train] == [
        "librispeech-103-1240-0000",
        "librispeech-103-1240-0001",
        "librispeech-103-1241-0000",
        "librispeech-1034-121119-0000",
    ]
    assert train[1] == Record(
        id="librispeech-103-1240-0001",
        audio=(str(librispeech / "train-clean-100/103/1240/103-1240-0001.flac"),),
        task="asr",
        target="that had its source",
        language="en",
        speaker="librispeech-103",
        duration=0.375,
        split="train",
        meta={"subset": "train-clean-100"},
    )
    assert [record.target for record in train[2:]] == ["we'll see", "the law"]
    assert [(r.target, r.split, r.speaker) for r in manifests["librispeech.test-clean"]] == [
        ("he hoped there would be stew", "test", "librispeech-1089"),
        ("stuff it into you", "test", "librispeech-1089"),
    ]
    assert [record.split for record in manifests["librispeech.dev-clean"]] == ["dev"]
    first = json.loads((tmp_path / "m/librispeech.dev-clean.jsonl").read_text())
    assert first["audio"] == os.path.relpath(
        librispeech / "dev-clean/1272/128104/1272-128104-0000.flac", tmp_path / "m"
    ), "relative to the manifest, so that the tree can be moved"
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["set", "split", "records", "hours", "answers"]
    assert table[1].split() == ["librispeech", "train-clean-100", "4", "0.00", "4", "texts"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("dev-clean"), "{}/dev-clean is missing: unpack dev-clean.tar.gz"),
        (remove(f"{TRAIN}/103-1240.trans.txt"), "{}/" + TRAIN + "/103-1240.trans.txt is missing: unpack"),
        (
            remove(f"{TRAIN}/103-1240-0001.flac"),
            "{}/" + TRAIN + "/103-1240-0001.flac is missing: unpack the subset's archive of https://www.openslr.org/12",
        ),
        (
            edit(TRANSCRIPTS, "0001 STUFF IT INTO YOU", "0001"),
            "{}/" + TRANSCRIPTS + ":2: expected '1089-134686-<number> TEXT', found '1089-134686-0001'",
        ),
        (
            edit(TRANSCRIPTS, "1089-134686-0001 STUFF IT INTO YOU\n", ""),
            "{}/" + TRANSCRIPTS + ": no line for 1089-134686-0001",
        ),
        (
            lambda folder: shutil.copytree(folder / "train-clean-100/103", folder / "test-clean/103"),
            "speaker librispeech-103 is in train-clean-100 and in test-clean",
        ),
    ],
)
def test_broken_librispeech_is_named(librispeech: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(librispeech, tmp_path / "set" / "LibriSpeech"))
    damage(folder)
    found = error_of("librispeech", tmp_path / "m", folder, "--subsets", *SUBSETS)
    assert found.startswith(message.format(folder))


def test_command_line_ends_with_one_line(librispeech: Path, tmp_path: Path) -> None:
    result = run_tool(TOOLS / "prepare/librispeech.py", librispeech.parent, "--out", tmp_path)
    assert result.returncode == 2
    missing = librispeech.parent / "train-clean-100"
    assert result.stderr.startswith(f"error: {missing} is missing: unpack train-clean-100.tar.gz of https://")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "recipe", ["librispeech", "librisqa", "covost2", "iemocap", "voxceleb1", "clotho", "audiocaps"]
)
def test_help_shows_layout_and_source(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_recipe(recipe, tmp_path, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "https://" in shown
    assert f"python tools/prepare/{recipe}.py" in shown
    assert "Written:" in shown


# --- LibriSQA -------------------------------------------------------------------------------------------

OPTIONS = "\nOptions:\nA. A farmhouse.\nB. A hunting lodge.\nC. A textile factory.\nD. A barn for grain."


def dev_speaker(wanted: bool) -> str:
    """The first speaker from 200 on that is (not) one of the fiftieth held out by md5."""
    names = map(str, range(200, 9999))
    return next(n for n in names if (int(hashlib.md5(f"librisqa/{n}".encode()).hexdigest(), 16) % 50 == 0) == wanted)


def entry(subset: str, utterance: str, question: str, answer: str, part: int) -> dict[str, object]:
    speaker, chapter_name, _ = utterance.split("-")
    path = f"LibriSpeech/{subset}/{speaker}/{chapter_name}/{utterance}.wav"
    common = {"speech_path": path, "text": "in the set", "duration": 0.25}
    if part == 1:
        return {**common, "question": question, "answer": answer}
    analysis = f"The answer is Option {answer} because"
    return {**common, "question_and_option": question, "answer": answer, "answer_and_analysis": analysis}


@pytest.fixture(scope="module")
def librisqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LibriSQA, and LibriSpeech beside it."""
    folder = tmp_path_factory.mktemp("sqa")
    kept, held = dev_speaker(False), dev_speaker(True)
    for speaker in (kept, held):
        chapter(folder / "LibriSpeech", "train-clean-360", f"{speaker}-7", "ONE", "TWO")
    chapter(folder / "LibriSpeech", "test-clean", "1089-134686", "THREE")
    questions = {
        "PartI-train": [
            entry("train-clean-360", f"{kept}-7-0000", "What is said? ", "One is said.", 1),
            entry("train-clean-360", f"{kept}-7-0000", "How often?", "Once.", 1),
            entry("train-clean-360", f"{held}-7-0001", "And here?", "Two.", 1),
            entry("train-clean-360", f"{kept}-7-0001", "Nothing?", " ", 1),
        ],
        "PartI-test": [entry("test-clean", "1089-134686-0000", "Which number?", "Three.", 1)],
        "PartII-train": [
            entry("train-clean-360", f"{kept}-7-0001", f"Question: Where is it?{OPTIONS}", "B", 2),
            entry("train-clean-360", f"{held}-7-0000", f"Where is it?{OPTIONS}", "Option C", 2),
            entry("train-clean-360", f"{kept}-7-0000", "Question: Where?\nA. Here.\nB. There.", "D", 2),
        ],
        "PartII-test": [entry("test-clean", "1089-134686-0000", f"Question: Where is it?{OPTIONS}", "A", 2)],
    }
    for name, entries in questions.items():
        part = name.split("-")[0]
        lines(folder / f"LibriSQA/LibriSQA-{part}/LibriSQA-{name}.json", json.dumps(entries, indent=1))
    return folder


def test_librisqa_record_by_record(librisqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speech = librisqa / "LibriSpeech"
    manifests = run_recipe("librisqa", tmp_path, librisqa / "LibriSQA", "--librispeech", speech)
    assert sorted(manifests) == [f"librisqa{part}.{split}" for part in (1, 2) for split in ("dev", "test", "train")]
    kept, held = dev_speaker(False), dev_speaker(True)
    first, second = manifests["librisqa1.train"]
    assert first == Record(
        id=f"librisqa1-{kept}-7-0000-1",
        audio=(str(speech / f"train-clean-360/{kept}/7/{kept}-7-0000.flac"),),
        task="speech_qa",
        target="One is said.",
        question="What is said?",
        language="en",
        speaker=f"librispeech-{kept}",
        duration=0.25,
        split="train",
        meta={"part": 1},
    )
    assert (second.id, second.question, second.target) == (f"librisqa1-{kept}-7-0000-2", "How often?", "Once.")
    (lettered,) = manifests["librisqa2.train"]
    assert lettered.target == "B"
    assert lettered.question == (
        "Where is it?\nA. A farmhouse.\nB. A hunting lodge.\nC. A textile factory.\nD. A barn for grain."
    )
    assert lettered.meta == {
        "part": 2,
        "choices": ["A", "B", "C", "D"],
        "options": ["A farmhouse.", "A hunting lodge.", "A textile factory.", "A barn for grain."],
    }
    assert (choices_for(first), choices_for(lettered)) == ((), ("A", "B", "C", "D")), "free text; a closed set"
    assert [(r.target, r.split) for r in manifests["librisqa2.dev"]] == [("C", "dev")]
    assert [(r.target, r.audio[0]) for r in manifests["librisqa2.test"]] == [
        ("A", str(speech / "test-clean/1089/134686/1089-134686-0000.flac"))
    ]
    for part in (1, 2):
        speakers = [{r.speaker for r in manifests[f"librisqa{part}.{split}"]} for split in ("train", "dev", "test")]
        assert speakers == [{f"librispeech-{kept}"}, {f"librispeech-{held}"}, {"librispeech-1089"}]
    shown = capsys.readouterr().out
    assert "1 entries of part 1 left out" in shown
    assert "LibriSQA-PartI-train.json: entry 4" in shown
    assert "LibriSQA-PartII-train.json: entry 3" in shown, "an answer that is none of the options"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("LibriSpeech/train-clean-360"), "{}/LibriSpeech/train-clean-360 is missing: unpack"),
        (remove("LibriSQA/LibriSQA-PartII"), "{}/LibriSQA/LibriSQA-PartII/LibriSQA-PartII-train.json is missing: get"),
        (
            remove("LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac"),
            "{}/LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac is missing: unpack",
        ),
        (
            edit("LibriSQA/LibriSQA-PartI/LibriSQA-PartI-train.json", "]", ""),
            "{}/LibriSQA/LibriSQA-PartI/LibriSQA-PartI-train.json: not JSON",
        ),
        (
            edit("LibriSQA/LibriSQA-PartI/LibriSQA-PartI-test.json", '"answer"', '"reply"'),
            "{}/LibriSQA/LibriSQA-PartI/LibriSQA-PartI-test.json: entry 1 has no text under 'answer'",
        ),
        (
            edit("LibriSQA/LibriSQA-PartI/LibriSQA-PartI-test.json", "1089-134686-0000.wav", "music.wav"),
            "{}/LibriSQA/LibriSQA-PartI/LibriSQA-PartI-test.json: entry 1: speech_path",
        ),
    ],
)
def test_broken_librisqa_is_named(librisqa: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(librisqa, tmp_path / "set" / "sqa"))
    damage(folder)
    found = error_of("librisqa", tmp_path / "m", folder / "LibriSQA", "--librispeech", folder / "LibriSpeech")
    assert found.startswith(message.format(folder))


# --- CoVoST 2 -------------------------------------------------------------------------------------------

TABLE = "covost_v2.en_zh-CN.train.tsv"
ROWS = {
    "train": [
        ("common_voice_en_1.mp3", 'He said "yes" to it.', "他说“是”。", "a" * 128),
        ("common_voice_en_2.mp3", "A back\\slash.", '反\\斜"杠', "b" * 128),
        ("common_voice_en_3.mp3", "Nobody translated this.", "", "b" * 128),
    ],
    "dev": [("common_voice_en_4.mp3", "Good morning.", "早上好。", "c" * 128)],
    "test": [("common_voice_en_5.mp3", "Thank you.", "谢谢。", "d" * 128)],
}


@pytest.fixture(scope="module")
def covost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder en of Common Voice 4 with CoVoST's tables, written by pandas with the official script's options."""
    folder = tmp_path_factory.mktemp("covost") / "en"
    for rows in ROWS.values():
        for number, row in enumerate(rows):
            sound(folder / "clips" / row[0], 0.5 + 0.1 * number, rate=48_000)
    for split, rows in ROWS.items():
        pd.DataFrame(rows, columns=["path", "sentence", "translation", "client_id"]).to_csv(
            folder / f"covost_v2.en_zh-CN.{split}.tsv",
            sep="\t", header=True, index=False, encoding="utf-8", escapechar="\\", quoting=csv.QUOTE_NONE,
        )
    edit("covost_v2.en_zh-CN.dev.tsv", "Good morning.", '"Good morning.')(folder)  # a quote that nobody escaped
    return folder


def test_covost_record_by_record(covost: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = run_recipe("covost2", tmp_path, covost)
    assert {name: len(records) for name, records in manifests.items()} == {
        "covost2.dev": 1, "covost2.test": 1, "covost2.train": 2,
    }
    first, second = manifests["covost2.train"]
    assert first.duration == pytest.approx(0.5, abs=0.06), "mp3 adds up to two frames"
    assert Record(**{**first.__dict__, "duration": None}) == Record(
        id="covost2-common_voice_en_1",
        audio=(str(covost / "clips/common_voice_en_1.mp3"),),
        task="translation",
        target="他说“是”。",
        instruction="Translate to Chinese.",
        language="en",
        speaker="a" * 128,
        split="train",
        meta={"sentence": 'He said "yes" to it.', "target_language": "zh-CN"},
    )
    assert (second.target, second.meta["sentence"]) == ('反\\斜"杠', "A back\\slash.")
    assert [(r.target, r.split, r.meta["sentence"]) for r in manifests["covost2.dev"]] == [
        ("早上好。", "dev", '"Good morning.')
    ]
    assert [(r.target, r.split) for r in manifests["covost2.test"]] == [("谢谢。", "test")]
    assert "1 rows of train left out, without a translation; the first: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("clips"), "{}/clips is missing: unpack the English Common Voice Corpus 4"),
        (remove("covost_v2.en_zh-CN.dev.tsv"), "{}/covost_v2.en_zh-CN.dev.tsv is missing: get CoVoST 2's"),
        (remove("clips/common_voice_en_4.mp3"), "{}/clips/common_voice_en_4.mp3 is missing: unpack"),
        (edit(TABLE, "translation", "target"), "{}/" + TABLE + ":1: no column 'translation'"),
        (edit(TABLE, "\t" + "b" * 128, ""), "{}/" + TABLE + ":3: not 4 fields"),
        (edit(TABLE, "mp3\t", "mp3\t\t"), "{}/" + TABLE + ":2: not 4 fields"),
        (
            lambda folder: (folder / TABLE).write_bytes("路径\tx\n".encode("gb18030")) and None,
            "{}/" + TABLE + ":1: not UTF-8",
        ),
    ],
)
def test_broken_covost_is_named(covost: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(covost, tmp_path / "set" / "en"))
    damage(folder)
    assert error_of("covost2", tmp_path / "m", folder).startswith(message.format(folder))


def test_a_manifest_goes_through_the_shard_tool(covost: Path, tmp_path: Path) -> None:
    run_recipe("covost2", tmp_path / "m", covost)
    result = run_tool(TOOLS / "shard_dataset.py", tmp_path / "m/covost2.train.jsonl", tmp_path / "shards", "--verify")
    assert result.returncode == 0, result.stderr
    index = ShardIndex.load(tmp_path / "shards")
    assert (index.samples, index.tasks) == (2, {"translation": 2})
    read = [index.read_sample(0, row) for row in range(2)]
    assert {sample.record.target for sample in read} == {"他说“是”。", '反\\斜"杠'}
    for sample in read:
        assert sample.waveform is not None
        assert sample.record.instruction == "Translate to Chinese."
        assert 8_000 <= len(sample.waveform) <= 10_600
        assert 0.05 < float(abs(sample.waveform).max()) < 0.5
