"""The rules of tools/prepare/: on made-up transcripts, and on the real manifests where they are there."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from listen_dist.data.manifest import read_manifest
from listen_dist.structures import Record

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools/prepare"))

import phone_prompts  # noqa: E402
import phone_rules as rules  # noqa: E402
from phone_pairs import Clip, draw_pairs  # noqa: E402
from sound_names import captions  # noqa: E402

TASKS = ("asr", "language_id", "speaker_verification", "speech_qa", "translation")


def made_up(count: int = 400) -> dict[str, str]:
    """Prompt id → text: single words, numbers, short and long sentences; a few sentences twice."""
    words = [
        "press",
        "please",
        "conference",
        "message",
        "seven",
        "extension",
        "mailbox",
        "number",
        "hello",
        "user",
    ]
    texts = {}
    for number in range(count):
        size = (1, 2, 3, 7, 9)[number % 5]
        chosen = [words[(number * 7 + step * (1 + number % 3)) % len(words)] for step in range(size)]
        texts[f"group/prompt-{number}"] = " ".join(chosen).capitalize() + "."
    texts["again-1"] = texts["again-2"] = "Exactly the same sentence!"
    return texts


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" Please  hold.", "Please hold."),
        ("[ascending tones]", ""),
        ("<beep ascending>", ""),
        ("(3 seconds of silence)", ""),
        ("at [@]", "at"),
        ("...has joined the conference.", "has joined the conference."),
        ("Press ...", "Press"),
        ("press * to pause, press # to exit", "press star to pause, press pound to exit"),
        ('IAX (note: does not say "2")', "IAX"),
        ("Hang up. (simple tone sound plays)", "Hang up."),
        ("That's A.M.", "That's A.M."),
    ],
)
def test_transcripts_are_cleaned(raw: str, clean: str) -> None:
    assert rules.clean_transcript(raw) == clean


def test_transcript_file_is_parsed() -> None:
    text = "; Core sounds: English\n\nbeep: [beep]\ndigits/1: one\nx: Press 1: now.\nno colon here\n"
    assert rules.parse_transcripts(text) == {"digits/1": "one", "x": "Press 1: now."}


def test_split_is_a_tenth_and_a_pure_function_of_the_id() -> None:
    assert rules.id_split("vm-goodbye") == rules.id_split("vm-goodbye")
    counts = Counter(rules.id_split(f"prompt-{number}") for number in range(5000))
    assert 400 < counts["test"] < 600
    assert 400 < counts["dev"] < 600
    held_out = next(f"p{n}" for n in range(99) if rules.digest(f"p{n}") % 10 == 0)
    assert rules.id_split(held_out) == "test"


def test_no_sentence_is_in_two_splits() -> None:
    texts = {f"p{number}": f"Sentence {number % 60}!" for number in range(600)}
    splits = rules.split_prompts(texts)
    sentences = {
        split: {rules.normalise(texts[prompt]) for prompt in group} for split, group in splits.items()
    }
    assert not sentences["train"] & sentences["test"]
    assert not sentences["train"] & sentences["dev"]
    assert not sentences["dev"] & sentences["test"]
    for split, group in splits.items():
        assert all(rules.id_split(prompt) == split for prompt in group)
    held = {prompt for prompt in texts if rules.id_split(prompt) == "test"}
    assert held == set(splits["test"]), "a test prompt is never dropped"


@pytest.mark.parametrize("kind", rules.QUESTION_KINDS)
def test_answers_are_balanced_in_every_kind(kind: str) -> None:
    questions = rules.keep_balanced(rules.QUESTION_KINDS[kind](made_up()), 120, kind)
    assert 20 <= len(questions) <= 120
    assert all(answer in choices for _, _, answer, choices in questions)
    by_place = Counter(choices.index(answer) for _, _, answer, choices in questions)
    assert len(set(by_place.values())) == 1, "no answer is more frequent than another"
    assert len({(prompt, question) for prompt, question, _, _ in questions}) == len(questions)


def test_questions_are_settled_by_the_transcript() -> None:
    texts = {"a": "Press seven now.", "b": "hello", "c": "The third message has been deleted today."}
    assert {(p, a) for p, _, a, _ in rules.number_questions(texts)} == {
        ("a", "yes"),
        ("b", "no"),
    }  # "third": unclear
    assert {(p, a) for p, _, a, _ in rules.length_questions(texts)} == {
        ("a", "few"),
        ("b", "one"),
        ("c", "many"),
    }
    said = {p for p, q, a, _ in rules.keyword_questions(texts) if "press" in q and a == "yes"}
    assert said == {"a"}
    for prompt, _, answer, choices in rules.word_questions(texts):
        assert answer in rules.words(texts[prompt])
        assert next(c for c in choices if c != answer) not in rules.words(texts[prompt])
    assert not rules.length_questions({"x": "IAX"}), "abbreviations are several words to the ear"


def made_up_clips(count: int = 60) -> list[Clip]:
    speakers = {"en": "allison", "es": "allison", "fr": "june", "it": "carlo", "ru": "r"}
    return [
        Clip(f"p{number}", language, speaker, 2.0, f"/{language}/{number}")
        for language, speaker in speakers.items()
        for number in range(count)
    ]


def test_pairs_are_balanced_and_unlike() -> None:
    pairs = draw_pairs(made_up_clips(), 200, "test")
    assert Counter(answer for _, _, answer in pairs) == {"yes": 100, "no": 100}
    assert len({frozenset((str(a), str(b))) for a, b, _ in pairs}) == 200
    for a, b, answer in pairs:
        assert (a.speaker == b.speaker) == (answer == "yes")
        assert a.prompt != b.prompt
    crossing = sum(a.language != b.language for a, b, answer in pairs if answer == "yes")
    assert 25 <= crossing <= 40, "Allison's two languages: language alone must not tell"
    speakers = Counter(tuple(sorted((a.speaker, b.speaker))) for a, b, answer in pairs if answer == "no")
    assert max(speakers.values()) - min(speakers.values()) <= 3
    assert pairs == draw_pairs(made_up_clips()[::-1], 200, "test"), "the order of the clips decides nothing"


def test_captions_follow_from_names() -> None:
    assert captions("wesnoth", "bow-miss-2")[0] == "an arrow is shot and misses"
    assert captions("wesnoth", "troll-hit-3") == captions("wesnoth", "troll-hit-1")
    assert captions("sonic-pi", "bass_hit_c")[0] == "a short bass hit"
    assert captions("sonic-pi", "loop_amen_full")[0] == "a loop of fast drums"
    assert 'a voice says "front left"' in captions("freedesktop", "audio-channel-front-left")
    for collection, name in [
        ("sonic-pi", "loop_garzul"),
        ("freedesktop", "device-added"),
        ("wesnoth", "chat-1"),
    ]:
        assert captions(collection, name) == (), "a name that says nothing gives no caption"
    for references in (captions("wesnoth", "axe"), captions("sonic-pi", "bd_808")):
        assert len(set(references)) == 4


# --- the real manifests, where `tools/prepare/phone_prompts.py` has run ----------------------------


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, list[Record]]]:
    """Task → split → records."""
    folder = ROOT / "assets/manifests"
    if not (folder / "translation.test.jsonl").is_file():
        pytest.skip("no manifests in assets/ (tools/prepare/phone_prompts.py)")
    return {
        task: {split: list(read_manifest(folder / f"{task}.{split}.jsonl")) for split in rules.SPLITS}
        for task in TASKS
    }


def test_no_recording_is_in_two_splits(real: dict[str, dict[str, list[Record]]]) -> None:
    used = defaultdict(set)
    prompts = defaultdict(set)
    for splits in real.values():
        for split, records in splits.items():
            for record in records:
                assert record.split == split
                used[split].update(record.audio)
                prompts[split].update(
                    path.split("phone_prompts/")[1].split("/", 1)[1] for path in record.audio
                )
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not used[a] & used[b]
        assert not prompts[a] & prompts[b], "the same prompt, in whatever language, is in one split"


@pytest.mark.parametrize("task", ["asr", "translation"])
def test_no_real_sentence_is_in_two_splits(real: dict[str, dict[str, list[Record]]], task: str) -> None:
    sentences = {
        split: {rules.normalise(record.target) for record in records} for split, records in real[task].items()
    }
    assert not sentences["train"] & (sentences["test"] | sentences["dev"])
    assert not sentences["dev"] & sentences["test"]


def test_real_classes_are_balanced(real: dict[str, dict[str, list[Record]]]) -> None:
    for task in ("language_id", "speaker_verification"):
        for records in real[task].values():
            assert len(set(Counter(record.target for record in records).values())) == 1
    for records in real["speech_qa"].values():
        top = Counter(record.target for record in records).most_common(1)[0][1]
        assert top / len(records) < 0.3
        for record in records:
            assert record.target in record.meta["choices"]  # type: ignore[operator]


def test_real_recordings_are_there(real: dict[str, dict[str, list[Record]]]) -> None:
    for splits in real.values():
        for records in splits.values():
            assert all(Path(path).is_file() for record in records for path in record.audio)


def test_the_full_sets_are_larger_balanced_and_of_the_training_prompts(
    real: dict[str, dict[str, list[Record]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = str(ROOT / "assets/recordings")
    command = ["phone_prompts.py", "--full", "--out", str(tmp_path), "--recordings", recordings]
    monkeypatch.setattr(sys, "argv", command)
    phone_prompts.main()
    held = {path for task in TASKS for split in ("dev", "test") for r in real[task][split] for path in r.audio}
    for task in ("language_id", "speaker_verification"):
        few, full = real[task]["train"], list(read_manifest(tmp_path / f"{task}_full.train.jsonl"))
        assert len(full) > 2 * len(few) and len({record.id for record in full}) == len(full)
        assert not held & {path for record in full for path in record.audio}
        assert len(set(Counter(record.target for record in full).values())) == 1
