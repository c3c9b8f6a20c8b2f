"""The recipes of Clotho and AudioCaps on miniatures in the sets' official layouts."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from listen_dist.data.manifest import ManifestError
from listen_dist.structures import Record
from tests.recipes import Damage, edit, error_of, remove, run_recipe, sound


def write_csv(path: Path, *rows: tuple[object, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


# --- Clotho ---------------------------------------------------------------------------------------------

HEADER = ("file_name", "caption_1", "caption_2", "caption_3", "caption_4", "caption_5")
SOUNDS = {
    "development": ("Distorted AM Radio noise.wav", "Paper_Parchment_Rustling.wav"),
    "validation": ("20090105.rain;drops (2).wav",),
    "evaluation": ("Santa Motor.wav", "Santa_Motor.wav"),
}


def five(name: str) -> tuple[str, ...]:
    return tuple(f'A "muddled", long noise {number} of {name[:4]}.' for number in range(1, 6))


def quoted(text: str) -> str:
    """As it stands between the quotes of a csv file."""
    return text.replace('"', '""')


EVALUATION = "clotho_captions_evaluation.csv"


@pytest.fixture(scope="module")
def clotho(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "clotho"
    for split, names in SOUNDS.items():
        write_csv(folder / f"clotho_captions_{split}.csv", HEADER, *((name, *five(name)) for name in names))
        write_csv(folder / f"clotho_metadata_{split}.csv", ("file_name", "keywords", "sound_id"))
        for name in names:
            sound(folder / split / name, 0.25, rate=44_100)
    return folder


def test_clotho_record_by_record(clotho: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = run_recipe("clotho", tmp_path, clotho)
    assert list(manifests) == ["clotho.dev", "clotho.test", "clotho.train"]
    train = manifests["clotho.train"]
    assert [(record.target, record.references) for record in train] == [
        (caption, ()) for name in SOUNDS["development"] for caption in five(name)
    ], "each caption is trained on"
    assert train[7] == Record(
        id="clotho-Paper_Parchment_Rustling-3",
        audio=(str(clotho / "development/Paper_Parchment_Rustling.wav"),),
        task="caption",
        target=five("Paper")[2],
        language="en",
        duration=0.25,
        split="train",
    )
    (dev,) = manifests["clotho.dev"]
    assert (dev.target, dev.references) == (five("2009")[0], five("2009"))
    assert dev.audio == (str(clotho / "validation/20090105.rain;drops (2).wav"),)
    assert dev.split == "dev"
    first, second = manifests["clotho.test"]
    assert first.references == five("Santa")
    assert (first.split, second.id) == ("test", "clotho-Santa_Motor")
    assert first.id.startswith("clotho-Santa_Motor-"), "names that differ in a blank stay two"
    assert capsys.readouterr().out.splitlines()[2].split() == ["clotho", "dev", "1", "0.00", "5", "texts"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("clotho_captions_validation.csv"), "{}/clotho_captions_validation.csv is missing: get"),
        (remove("evaluation"), "{}/evaluation is missing: get"),
        (remove("development/Paper_Parchment_Rustling.wav"), "{}/development/Paper_Parchment_Rustling.wav is missing"),
        (edit(EVALUATION, "caption_5", "caption5"), "{}/" + EVALUATION + ":1: no column 'caption_5'"),
        (edit(EVALUATION, f',"{quoted(five("Santa")[4])}"', ""), "{}/" + EVALUATION + ":2: not 6 fields"),
        (edit(EVALUATION, quoted(five("Santa")[1]), " "), "{}/" + EVALUATION + ":2: caption_2 is empty"),
    ],
)
def test_broken_clotho_is_named(clotho: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(clotho, tmp_path / "set" / "clotho"))
    damage(folder)
    assert error_of("clotho", tmp_path / "m", folder).startswith(message.format(folder))


# --- AudioCaps ------------------------------------------------------------------------------------------

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
CAPTIONS = {
    "train": [
        (91139, "r1nicOVtvkQ", 130, "A woman talks nearby as water pours"),
        (58146, "-0Cz4Y5F2uM", 30, "Multiple clanging and clanking sounds"),
        (58147, "-0Cz4Y5F2uM", 30, "Metal clangs, then stops"),
    ],
    "val": [
        (97151, "vfY_TJq7n_U", 130, "Rustling occurs, ducks quack and water splashes"),
        (108945, "tdWhHV3X25Q", 60, "An audience gives applause"),
        (97152, "vfY_TJq7n_U", 130, "Ducks quack"),
        (97153, "vfY_TJq7n_U", 20, "Another place of the same video"),
    ],
    "test": [(number, "CZlzcBgp3oc", 0, f"A man speaks {number}") for number in range(5)],
}


@pytest.fixture(scope="module")
def audiocaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "audiocaps"
    for split, rows in CAPTIONS.items():
        write_csv(folder / f"{split}.csv", COLUMNS, *rows)
        for _, video, start, _ in rows:
            sound(folder / f"audio/{split}/{video}_{start}.wav", 0.25, rate=32_000)
    return folder


def test_audiocaps_record_by_record(audiocaps: Path, tmp_path: Path) -> None:
    manifests = run_recipe("audiocaps", tmp_path, audiocaps)
    assert list(manifests) == ["audiocaps.dev", "audiocaps.test", "audiocaps.train"]
    train = manifests["audiocaps.train"]
    assert [(record.id, record.target, record.references) for record in train] == [
        ("audiocaps-91139", "A woman talks nearby as water pours", ()),
        ("audiocaps-58146", "Multiple clanging and clanking sounds", ()),
        ("audiocaps-58147", "Metal clangs, then stops", ()),
    ]
    dev = manifests["audiocaps.dev"]
    assert dev[0] == Record(
        id="audiocaps-vfY_TJq7n_U_130",
        audio=(str(audiocaps / "audio/val/vfY_TJq7n_U_130.wav"),),
        task="caption",
        target="Rustling occurs, ducks quack and water splashes",
        references=("Rustling occurs, ducks quack and water splashes", "Ducks quack"),
        language="en",
        duration=0.25,
        split="dev",
        meta={"youtube_id": "vfY_TJq7n_U", "start_time": "130"},
    )
    assert [(record.id, record.answers) for record in dev[1:]] == [
        ("audiocaps-tdWhHV3X25Q_60", ("An audience gives applause",)),
        ("audiocaps-vfY_TJq7n_U_20", ("Another place of the same video",)),
    ]
    (test,) = manifests["audiocaps.test"]
    assert test.references == tuple(f"A man speaks {number}" for number in range(5))


def test_audiocaps_finds_clips_by_a_pattern(audiocaps: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(audiocaps, tmp_path / "set"))
    shutil.rmtree(folder / "audio")
    for split, rows in CAPTIONS.items():
        for number, *_ in rows:
            sound(folder / f"{split}/{number}.flac")
    manifests = run_recipe("audiocaps", tmp_path / "m", folder, "--audio", "{split}/{audiocap_id}.flac")
    assert manifests["audiocaps.dev"][0].audio == (str(folder / "val/97151.flac"),)


def test_clips_that_are_gone_are_left_out_when_told(
    audiocaps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(audiocaps, tmp_path / "set"))
    for name in ("train/-0Cz4Y5F2uM_30", "val/vfY_TJq7n_U_130"):
        (folder / f"audio/{name}.wav").unlink()
    found = error_of("audiocaps", tmp_path / "m", folder)
    assert found.startswith(f"{folder}/audio/train/-0Cz4Y5F2uM_30.wav is missing: fetch the clip")
    assert "--skip-missing" in found
    manifests = run_recipe("audiocaps", tmp_path / "m", folder, "--skip-missing")
    assert [record.id for record in manifests["audiocaps.train"]] == ["audiocaps-91139"]
    assert len(manifests["audiocaps.dev"]) == 2
    shown = capsys.readouterr().out
    assert f"2 of 3 clips of train left out, not there; the first: {folder}/audio/train/-0Cz4Y5F2uM_30.wav" in shown


def test_a_length_that_no_header_tells_is_left_open(
    audiocaps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(audiocaps, tmp_path / "set"))
    damaged = folder / "audio/val/tdWhHV3X25Q_60.wav"
    damaged.write_bytes(b"not audio")
    manifests = run_recipe("audiocaps", tmp_path / "m", folder)
    assert [record.duration for record in manifests["audiocaps.dev"]] == [0.25, None, 0.25]
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "header tells no length" in line)
    assert told.startswith("1 files")
    assert told.endswith(f"; the first: {damaged}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("test.csv"), "{}/test.csv is missing: get train.csv, val.csv and test.csv"),
        (remove("audio"), "{}/audio/train/r1nicOVtvkQ_130.wav is missing: fetch the clip"),
        (edit("val.csv", "youtube_id", "ytid"), "{}/val.csv:1: no column 'youtube_id'; found audiocap_id, ytid"),
        (edit("val.csv", '"Rustling occurs, ducks', "Rustling occurs, ducks"), "{}/val.csv:2: not 4 fields"),
        (edit("val.csv", "An audience gives applause", ""), "{}/val.csv:3: the caption is empty"),
    ],
)
def test_broken_audiocaps_is_named(audiocaps: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(audiocaps, tmp_path / "set" / "audiocaps"))
    damage(folder)
    assert error_of("audiocaps", tmp_path / "m", folder).startswith(message.format(folder))


def test_a_pattern_of_unknown_columns_is_refused(audiocaps: Path, tmp_path: Path) -> None:
    found = error_of("audiocaps", tmp_path, audiocaps, "--audio", "{ytid}.wav")
    assert found == "--audio {ytid}.wav: use {split} and {audiocap_id}, {youtube_id}, {start_time}, {caption}"


def test_no_manifest_is_written_where_another_split_is_wrong(clotho: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clotho, tmp_path / "set" / "clotho"))
    edit(EVALUATION, "Santa_Motor.wav", "Santa Motor.wav")(folder)
    with pytest.raises(ManifestError, match=r"clotho\.test: id 'clotho-Santa_Motor-\w+' comes twice"):
        run_recipe("clotho", tmp_path / "m", folder)
    assert not list((tmp_path / "m").glob("*"))
