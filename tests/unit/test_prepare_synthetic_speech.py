"""The rules of tools/prepare/synthetic_speech.py on made-up texts; flite and the manifests where they are there."""

from __future__ import annotations

import sys
import wave
from dataclasses import replace
from pathlib import Path

import pytest

from listen_dist.data.decode import decode_audio
from listen_dist.data.manifest import read_manifest
from listen_dist.structures import Record

ROOT = Path(__file__).parents[2]
RECORDINGS = ROOT / "assets/recordings/synthetic"
sys.path.insert(0, str(ROOT / "tools/prepare"))

import synthetic_speech as speech  # noqa: E402
from phone_rules import normalise  # noqa: E402
from recipe import PrepareError  # noqa: E402


def made_up(count: int = 300) -> str:
    """A collection of fortunes: `count` different sentences of 4 to 10 words."""
    words = "we you they see hear like some good old new music books".split()
    lines = []
    for number in range(count):
        spelled = [words[number // 12**place % 12] for place in range(3)]
        lines.append(f"{' '.join(['so', *spelled, *words[: number % 7]]).capitalize()}.")
    return "\n%\n".join(lines)


@pytest.mark.parametrize(
    ("fortune", "sentences"),
    [
        ("A bird in\nthe hand.  Is it?\n", ["A bird in the hand.", "Is it?"]),
        ('"If it works, leave it."\n\t\t-- Bert Lantz, "On Things"\n\t\t   and so on.', ["If it works, leave it."]),
        ("Q:\tWhat is green?\nA:\tA leaf.", ["What is green?", "A leaf."]),
        ("First one.\n\nSecond one.", ["First one.", "Second one."]),
        ("We met Mr. Smith there.", ["We met Mr@ Smith there."]),
        ("\t\t-- Anon.", []),
    ],
)
def test_fortunes_are_split_into_sentences(fortune: str, sentences: list[str]) -> None:
    assert speech.split_sentences(fortune) == sentences


@pytest.mark.parametrize(
    "sentence", ["Who cares?", "I'm sorry, but I can't.", "A well-known fact: it rains.", "So simple!"]
)
def test_plain_sentences_are_clean(sentence: str) -> None:
    assert speech.is_clean(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "no capital in front.",
        "No sign at the end",
        "A BIG hole.",
        "Give me 10 of them.",
        "See www.example.com now.",
        "See http://example.com.",
        "He met Mr@ Smith.",
        "We ask Kirk for help.",
        "I like caf\u00e9s.",
        'He said "no" to it.',
        "Wait -- not now.",
        "It was a damned good day.",
        "Shit happens.",
    ],
)
def test_anything_else_is_dropped(sentence: str) -> None:
    assert not speech.is_clean(sentence)


def test_sentences_are_short_distinct_and_of_words_that_come_again() -> None:
    texts = ["We like tea.\n%\nWe like tea!\n%\nTea.\n%\nWe like xyzzy.\n%\n" + "We like tea and more tea. " * 3]
    assert speech.clean_sentences(texts) == ["We like tea and more tea.", "We like tea!"]
    assert speech.clean_sentences(["We " + "like " * 10 + "tea.\n%\n" + "We tea. " * 3]) == ["We tea."]


def test_choice_is_a_pure_function_of_the_texts() -> None:
    few, many = (speech.choose_clips([made_up()], count, set()) for count in (50, 150))
    assert few == many[: len(few)], "a smaller run is a part of a bigger one"
    assert many == speech.choose_clips(made_up().split("%")[::-1], 150, set()), "the order decides nothing"
    assert len({clip.id for clip in many}) == len(many)
    assert all(0.85 <= clip.stretch <= 1.15 for clip in many)
    assert len({clip.stretch for clip in many}) > 20


def test_ids_are_pinned() -> None:
    clip = speech.Clip("Who cares?", "slt", "train")
    assert (clip.id, clip.stretch) == ("syn-slt-d2484a9110", 1.11), "other ids orphan the recordings that are there"


def test_perturbed_clips_have_ids_and_speeds_of_their_own() -> None:
    clips = [clip.perturbed for clip in speech.choose_clips([made_up()], 150, set())]
    assert {clip.percent for clip in clips} == set(speech.SPEED_PERCENT)
    assert speech.Clip("Who cares?", "slt", "train").perturbed.id == "syn-slt-d2484a9110-112"


def test_splits_share_no_sentence_and_no_voice() -> None:
    clips = speech.choose_clips([made_up()], 150, set())
    held = [clip for clip in clips if clip.split == "test"]
    train = [clip for clip in clips if clip.split == "train"]
    assert (len(held), len(train)) == (speech.TEST_SENTENCES, 150)
    assert not {normalise(c.text) for c in held} & {normalise(c.text) for c in train}
    assert {clip.voice for clip in held} == {"awb"}
    assert {clip.voice for clip in train} == {"kal16", "rms", "slt"}


def test_known_sentences_are_left_out() -> None:
    first = speech.choose_clips([made_up()], 10, set())
    known = {normalise(clip.text) for clip in first}
    assert not known & {normalise(clip.text) for clip in speech.choose_clips([made_up()], 100, known)}


def test_too_many_sentences_asked_for() -> None:
    with pytest.raises(PrepareError, match=r"^--sentences 9999: the texts hold \d+ clean sentences"):
        speech.choose_clips([made_up()], 9999, set())


PROMPTS = ["press one to leave the menu", "press two to hear the message", "to hear the menu press one"]


def test_recombined_sentences_take_the_prompts_words_in_a_new_order() -> None:
    pairs = {pair for prompt in PROMPTS for pair in zip(["", *prompt.split()], [*prompt.split(), ""], strict=True)}
    found = speech.recombined(PROMPTS, 6, set(PROMPTS))
    assert len(set(found)) == 6 and not set(found) & set(PROMPTS)
    for text in found:
        assert set(zip(["", *text.split()], [*text.split(), ""], strict=True)) <= pairs
    assert speech.recombined(PROMPTS, 3, set(PROMPTS)) == found[:3]
    with pytest.raises(PrepareError, match="1000 sentences in new orders: there are"):
        speech.recombined(PROMPTS, 1000, set(PROMPTS))


def test_words_alone_are_closed_classes_by_every_voice_then_the_commonest() -> None:
    closed = (len(speech.CLOSED_CLASSES) - 1) * len(speech.TRAIN_VOICES)
    clips = speech.single_words([made_up()], closed + 3, {"five", "books"})
    assert not {"Five.", "Books."} & {clip.text for clip in clips}
    assert [(clip.text, clip.voice) for clip in clips[:3]] == [("Zero.", voice) for voice in speech.TRAIN_VOICES]
    assert all(clip.split == "train" and len(clip.text.split()) == 1 for clip in clips)
    commonest = [normalise(clip.text) for clip in clips[closed:]]
    words = [word for text in speech.clean_sentences([made_up()]) for word in normalise(text).split()]
    expected = sorted({w for w in words if len(w) > 2} - {"books"}, key=lambda w: (-words.count(w), w))
    assert commonest == expected[:3]
    with pytest.raises(PrepareError, match="--words 9999: there are"):
        speech.single_words([made_up()], 9999, set())


@pytest.mark.parametrize(
    ("rename", "name", "target"),
    [
        (speech._program_name, "usr/bin/flite", "synthetic/flite/flite"),
        (speech._program_name, "usr/bin/flite_time", None),
        (speech._library_name, "usr/lib/aarch64-linux-gnu/libflite.so.2.2", "synthetic/flite/libflite.so.1"),
        (speech._library_name, "usr/lib/x86_64-linux-gnu/libasound.so.2.0.0", "synthetic/flite/libasound.so.2"),
        (speech._library_name, "usr/share/doc/libflite1/README", None),
        (speech._text_name, "usr/share/games/fortunes/wisdom", "synthetic/fortunes/wisdom"),
        (speech._text_name, "usr/share/games/fortunes/wisdom.dat", None),
        (speech._text_name, "usr/share/games/fortunes/off/wisdom", None),
        (speech._text_name, "usr/share/games/fortunes/zippy", None),
    ],
)
def test_files_taken_from_packages(rename: object, name: str, target: str | None) -> None:
    assert rename(name) == target  # type: ignore[operator]


@pytest.mark.parametrize(("rate", "frames", "cut"), [(8000, 8000, 0), (16000, 8, 0), (16000, 8000, 9000)])
def test_unusable_wav_files_are_refused(tmp_path: Path, rate: int, frames: int, cut: int) -> None:
    path = tmp_path / "clip.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(2 * frames))
    path.write_bytes(path.read_bytes()[: -cut or None])
    with pytest.raises(PrepareError, match="delete it and run again"):
        speech.wav_seconds(path)


def test_missing_flite_is_named(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    with pytest.raises(PrepareError, match="flite does not start"):
        speech.speak(speech.Clip("Who cares?", "slt", "train"), tmp_path)
    assert not list((tmp_path / "clips").iterdir())


# --- the real voices and manifests, where `tools/prepare/synthetic_speech.py` has run --------------


@pytest.mark.skipif(not (RECORDINGS / "flite/flite").is_file(), reason="no flite in assets/recordings")
def test_flite_speaks_once(tmp_path: Path) -> None:
    (tmp_path / "flite").symlink_to(RECORDINGS / "flite")
    clip = speech.Clip("Good morning to all of you.", "kal16", "train")
    [record] = speech.speak_all([clip], tmp_path, workers=1)
    audio = decode_audio(record.audio[0])
    assert record.duration == pytest.approx(len(audio) / 16000, abs=1e-4)
    assert 0.5 < record.duration < 5 and abs(audio).max() > 0.1
    before = Path(record.audio[0]).stat()
    assert speech.speak_all([clip], tmp_path, workers=1) == [record]
    assert Path(record.audio[0]).stat().st_mtime_ns == before.st_mtime_ns, "a finished clip is kept"
    assert [path.name for path in (tmp_path / "clips").iterdir()] == [f"{clip.id}.wav"]
    [faster] = speech.speak_all([replace(clip, percent=115)], tmp_path, workers=1)
    assert faster.id == f"{clip.id}-115" and faster.target == record.target
    assert faster.duration == pytest.approx(record.duration / 1.15, abs=1e-3)
    with pytest.raises(PrepareError, match="16 kHz"):  # flite takes its 8 kHz voice for a name it doesn't know
        speech.speak_all([replace(clip, voice="nobody")], tmp_path, workers=1)


@pytest.fixture(scope="module")
def real() -> dict[str, list[Record]]:
    """Split → records."""
    paths = {split: ROOT / f"assets/manifests/asr_synthetic.{split}.jsonl" for split in ("train", "test")}
    if not all(path.is_file() for path in paths.values()):
        pytest.skip("no manifests in assets/ (tools/prepare/synthetic_speech.py)")
    return {split: list(read_manifest(path)) for split, path in paths.items()}


def test_no_real_sentence_is_in_two_splits(real: dict[str, list[Record]]) -> None:
    train, held = ({normalise(record.target) for record in real[split]} for split in ("train", "test"))
    assert not train & held
    assert not (train | held) & speech.known_sentences(ROOT / "assets/manifests")
    assert len(train) == len(real["train"]) and len(held) == len(real["test"])


def test_real_recordings_are_there_and_short(real: dict[str, list[Record]]) -> None:
    assert {record.speaker for record in real["test"]} == {"flite-awb"}
    assert {record.speaker for record in real["train"]} == {f"flite-{name}" for name in speech.TRAIN_VOICES}
    for split, records in real.items():
        assert all(record.split == split and Path(record.audio[0]).is_file() for record in records)
        assert 1.8 < sum(record.duration or 0.0 for record in records) / len(records) < 3.2
