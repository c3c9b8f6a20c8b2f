"""The recipes of IEMOCAP and VoxCeleb1 on miniatures in the sets' official layouts."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from listen_dist.structures import Record
from listen_dist.tasks import choices_for
from tests.recipes import TOOLS, Damage, edit, error_of, lines, remove, run_recipe, sound

sys.path.insert(0, str(TOOLS / "prepare"))

from voxceleb1 import draw_pairs

# --- IEMOCAP --------------------------------------------------------------------------------------------

LABELS = ("neu", "xxx", "exc", "hap", "ang", "fru", "sad")


def dialog(session: int, name: str, folder: Path) -> None:
    """Write a dialog's evaluation as the release has it, and the wav of each turn; F and M speak in turn."""
    stem = f"Ses0{session}{name}"
    rows = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for number, label in enumerate(LABELS):
        turn = f"{stem}_{'FM'[number % 2]}{number:03d}"
        rows += [
            f"[{6.2901 + number:.4f} - {8.2357 + number:.4f}]\t{turn}\t{label}\t[2.5000, 2.5000, 2.5000]",
            "C-E2:\tNeutral;\t()",
            "C-F1:\tNeutral;\t(curious)",
            "A-E3:\tval 3; act 2; dom  2;\t()",
            "",
        ]
        sound(folder / f"Session{session}/sentences/wav/{stem}/{turn}.wav", 0.25)
    lines(folder / f"Session{session}/dialog/EmoEvaluation/{stem}.txt", *rows)
    # what the release holds besides: single annotators' files and a Mac's leftovers
    lines(folder / f"Session{session}/dialog/EmoEvaluation/Categorical/{stem}_e2_cat.txt", "x :Neutral state; ()")
    (folder / f"Session{session}/dialog/EmoEvaluation/._{stem}.txt").write_bytes(b"\x00\x05\x16\x07")


@pytest.fixture(scope="module")
def iemocap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "IEMOCAP_full_release"
    for session in range(1, 6):
        dialog(session, "F_impro01", folder)
    dialog(3, "M_script01_1b", folder)
    return folder


def test_iemocap_record_by_record(iemocap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = run_recipe("iemocap", tmp_path, iemocap, "--held-out", 2)
    assert list(manifests) == ["iemocap_fold2.dev", "iemocap_fold2.test", "iemocap_fold2.train"]
    test = manifests["iemocap_fold2.test"]
    assert test[0] == Record(
        id="iemocap-Ses02F_impro01_F000",
        audio=(str(iemocap / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F000.wav"),),
        task="emotion",
        target="neutral",
        language="en",
        speaker="Ses02_F",
        duration=0.25,
        split="test",
        meta={"choices": ["angry", "happy", "sad", "neutral"], "label": "neu", "session": 2},
    )
    assert [(r.id[-4:], r.meta["label"], r.target, r.speaker) for r in test] == [
        ("F000", "neu", "neutral", "Ses02_F"),
        ("F002", "exc", "happy", "Ses02_F"),
        ("M003", "hap", "happy", "Ses02_M"),
        ("F004", "ang", "angry", "Ses02_F"),
        ("F006", "sad", "sad", "Ses02_F"),
    ]
    assert {choices_for(record) for record in test} == {("angry", "happy", "sad", "neutral")}
    dev = manifests["iemocap_fold2.dev"]
    assert [record.meta["session"] for record in dev] == [3] * 10
    assert dev[5].audio[0].endswith("/Session3/sentences/wav/Ses03M_script01_1b/Ses03M_script01_1b_F000.wav")
    assert "iemocap_fold2         test                   5     0.00  angry 1, happy 2, neutral 1, sad 1" in (
        capsys.readouterr().out
    )


def test_every_session_is_held_out_once_and_nobody_is_in_two_splits(iemocap: Path, tmp_path: Path) -> None:
    held = []
    for session in range(1, 6):
        manifests = run_recipe("iemocap", tmp_path / str(session), iemocap, "--held-out", session)
        splits = {name.split(".")[1]: records for name, records in manifests.items()}
        sessions = {split: {record.meta["session"] for record in records} for split, records in splits.items()}
        speakers = [record.speaker for records in splits.values() for record in records]
        assert len({(record.speaker, record.split) for records in splits.values() for record in records}) == 10
        assert len(set(speakers)) == 10
        assert len(sessions["train"]) == 3
        held.append((*sessions["test"], *sessions["dev"]))
        assert len(set.union(*sessions.values())) == 5
    assert held == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 1)]


EVALUATION = "Session4/dialog/EmoEvaluation/Ses04F_impro01.txt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("Session1"), "{}/Session1/dialog/EmoEvaluation is missing: unpack IEMOCAP_full_release so that"),
        (remove(EVALUATION), "{}/Session4/dialog/EmoEvaluation/Ses*.txt is missing: unpack"),
        (remove("Session3/sentences"), "{}/Session3/sentences/wav is missing: unpack"),
        (
            remove("Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_M003.wav"),
            "{}/Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_M003.wav is missing: unpack",
        ),
        (edit(EVALUATION, "\tneu\t", " neu "), "{}/" + EVALUATION + ":3: expected [start - end] Ses04F_impro01_"),
        (edit(EVALUATION, "Ses04F_impro01_F000", "Ses03F_impro01_F000"), "{}/" + EVALUATION + ":3: expected"),
    ],
)
def test_broken_iemocap_is_named(iemocap: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(iemocap, tmp_path / "set" / "IEMOCAP_full_release"))
    damage(folder)
    assert error_of("iemocap", tmp_path / "m", folder).startswith(message.format(folder))


# --- VoxCeleb1 ------------------------------------------------------------------------------------------


def is_dev(speaker: str, seed: int = 0) -> bool:
    return int(hashlib.md5(f"voxceleb1/{seed}/{speaker}".encode()).hexdigest(), 16) % 30 == 0


TRAINABLE = [f"id{number}" for number in range(10001, 10270)]
DEV = [speaker for speaker in TRAINABLE if is_dev(speaker)][:2]
TRAIN = [speaker for speaker in TRAINABLE if not is_dev(speaker)][:4]
TEST = ["id10270", "id10309"]
VIDEOS = ("-0AbC_dE1fg", "5r0dWxy17C8")
TRIALS = (
    f"1 id10270/{VIDEOS[0]}/00001.wav id10270/{VIDEOS[1]}/00002.wav",
    f"0 id10270/{VIDEOS[0]}/00001.wav id10309/{VIDEOS[1]}/00001.wav",
    f"0 id10309/{VIDEOS[0]}/00002.wav id10270/{VIDEOS[1]}/00002.wav",
    f"1 id10270/{VIDEOS[0]}/00001.wav id10270/{VIDEOS[1]}/00002.wav",
)


@pytest.fixture(scope="module")
def voxceleb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "voxceleb1"
    for speaker in (*TRAIN, *DEV, *TEST):
        for video in VIDEOS:
            for number in (1, 2):
                sound(folder / f"wav/{speaker}/{video}/{number:05d}.wav", 0.25 * number)
    lines(folder / "veri_test2.txt", *TRIALS)
    return folder


def test_voxceleb_trials_record_by_record(voxceleb: Path, tmp_path: Path) -> None:
    test = run_recipe("voxceleb1", tmp_path, voxceleb, "--pairs", 40, "--dev-pairs", 8)["voxceleb1.test"]
    assert test[0] == Record(
        id="vox1-000001-id10270--0AbC_dE1fg-00001-id10270-5r0dWxy17C8-00002",
        audio=(
            str(voxceleb / "wav/id10270/-0AbC_dE1fg/00001.wav"),
            str(voxceleb / "wav/id10270/5r0dWxy17C8/00002.wav"),
        ),
        task="speaker_verification",
        target="yes",
        speaker="id10270",
        duration=0.85,  # 0.25 s, 0.1 s of silence between, 0.5 s
        split="test",
        meta={"choices": ["yes", "no"]},
    )
    assert [record.target for record in test] == ["yes", "no", "no", "yes"], "every trial, in the list's order"
    assert {choices_for(record) for record in test} == {("yes", "no")}
    assert test[2].speaker == "id10270+id10309"
    assert test[2].audio[0].endswith("/id10309/-0AbC_dE1fg/00002.wav")


def test_voxceleb_pairs_are_drawn_fairly(voxceleb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = run_recipe("voxceleb1", tmp_path, voxceleb, "--pairs", 24, "--dev-pairs", 9)
    train, dev = manifests["voxceleb1.train"], manifests["voxceleb1.dev"]
    assert Counter(record.target for record in train) == {"yes": 12, "no": 12}
    assert Counter(record.target for record in dev) == {"yes": 4, "no": 4}
    for records, speakers in ((train, TRAIN), (dev, DEV)):
        assert {name for record in records for name in record.speaker.split("+")} == set(speakers)
        assert len({frozenset(record.audio) for record in records}) == len(records), "no pair twice"
        for record in records:
            (one, video, _), (two, other, _) = (Path(path).parts[-3:] for path in record.audio)
            assert (one == two) == (record.target == "yes")
            assert one != two or video != other, "a video must not tell the answer"
        anchors = {answer: Counter(r.audio[0] for r in records if r.target == answer) for answer in ("yes", "no")}
        assert anchors["yes"] == anchors["no"], "which clip comes first must not tell the answer"
    assert "6 training speakers are there (the whole set has 1,211)" in capsys.readouterr().out


def test_voxceleb_pairs_are_a_function_of_names_and_seed(voxceleb: Path, tmp_path: Path) -> None:
    clips = {s: [f"{s}/{v}/{n:05d}.wav" for v in VIDEOS for n in (1, 2)] for s in ("id1", "id2", "id3")}
    pairs = draw_pairs(clips, 10, seed=0)
    assert pairs == draw_pairs({s: clips[s] for s in reversed(clips)}, 10, seed=0)
    assert pairs[:6] == draw_pairs(clips, 6, seed=0), "a smaller run is a part of a bigger one"
    assert pairs != draw_pairs(clips, 10, seed=1)
    assert pairs[:2] == [
        ("id2/5r0dWxy17C8/00002.wav", "id2/-0AbC_dE1fg/00001.wav", "yes"),
        ("id2/5r0dWxy17C8/00002.wav", "id1/-0AbC_dE1fg/00001.wav", "no"),
    ], "the same on every machine and Python"
    assert draw_pairs({"id1": clips["id1"]}, 10, seed=0) == [], "one speaker alone gives no pairs"
    everything = draw_pairs(clips, 10_000, seed=0)
    same = 3 * 4  # speaker by speaker: two clips of one video with two of the other
    assert Counter(answer for _, _, answer in everything) == {"yes": same, "no": same}, "fewer when there are no more"
    one = (tmp_path / "a", tmp_path / "b")
    for out in one:
        run_recipe("voxceleb1", out, voxceleb, "--pairs", 20, "--dev-pairs", 4)
    names = ("train", "dev", "test")
    first, second = ([(out / f"voxceleb1.{name}.jsonl").read_bytes() for name in names] for out in one)
    assert first == second



@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("wav"), "{}/wav is missing: unpack vox1_dev_wav.zip and vox1_test_wav.zip"),
        (remove("veri_test2.txt"), "{}/veri_test2.txt is missing: get the list of trial pairs"),
        (
            remove(f"wav/id10309/{VIDEOS[1]}/00001.wav"),
            "{}/wav/id10309/" + VIDEOS[1] + "/00001.wav is missing: unpack vox1_dev_wav.zip",
        ),
        (
            lambda folder: [shutil.rmtree(folder / "wav" / speaker) for speaker in (*TRAIN, *DEV)] and None,
            "{}/wav/id10001 is missing: unpack",
        ),
        (edit("veri_test2.txt", "0 id10270", "1 id10270"), "{}/veri_test2.txt:2: expected '1 clip clip'"),
        (edit("veri_test2.txt", ".wav id", ".wav\tid"), "{}/veri_test2.txt:1: expected"),
        (edit("veri_test2.txt", "id10309", "id10310"), "{}/veri_test2.txt:2: a training speaker in the trials"),
    ],
)
def test_broken_voxceleb_is_named(voxceleb: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = Path(shutil.copytree(voxceleb, tmp_path / "set" / "voxceleb1"))
    damage(folder)
    assert error_of("voxceleb1", tmp_path / "m", folder).startswith(message.format(folder))
