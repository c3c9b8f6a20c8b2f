"""tools/prepare/game_speech.py and game_archive.py on a data file of a few hand-made bytes."""

from __future__ import annotations

import struct
import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/prepare"))

import game_archive
import game_speech
from game_archive import Line
from recipe import PrepareError

from listen_dist.data.manifest import write_manifest
from listen_dist.structures import Record

HEADER = bytes(20)


def table(entries: dict[str, bytes]) -> bytes:
    head = b"QTBLCEM10".ljust(13, b"\0") + struct.pack(">H", len(entries))
    offset, rows = len(head) + 21 * len(entries), b""
    for name, content in entries.items():
        rows += struct.pack(">12sxII", name.encode(), offset, len(content))
        offset += len(content)
    return head + rows + b"".join(entries.values())


def string(text: str) -> bytes:
    raw = bytes([len(text)]) + text.encode("latin-1")
    return raw + bytes(len(raw) % 2)


def with_id(number: int, text: str) -> bytes:
    raw = struct.pack(">HH", 0, number) + bytes([len(text)]) + text.encode("latin-1")
    return raw + bytes(-len(raw) % 4)


def dialogue() -> bytes:
    """Talk key 7, one level, Joe's strings 0 and 10, the other person's 1, two greetings."""
    joe = with_id(0, "*FRHi Bob!*04It's me.*03") + with_id(10, "Bye*00")
    person = with_id(1, "Caf\xe9?*XY00(128,112)*FLNo.")
    answers = 32 + 96 + len(joe)
    again = answers + len(person)
    head = struct.pack(">11h3H", -1, 0, 7, 2, 1, *[0] * 6, answers, again, again).ljust(128, b"\0")
    return HEADER + head + joe + person + string("Again?") + string("Again.*02")


def scene(first: bytes = b"\0") -> bytes:
    """Joe's turn, one of object 2 with a frame of an animation and two people coming on, one of a thing."""
    turns = struct.pack(">17hH", 0, *[0] * 16, 0)
    turns += struct.pack(">17hH2h10hh", 2, *[0] * 4, 1, *[0] * 11, 2, 1, 2, *[7] * 10, -2)
    turns += struct.pack(">17hH", 9, *[0] * 16, 0)
    start = 12 + len(turns) + 2
    body = first
    for text in ("*01", "*FLHey!*03", "Boo"):
        body += bytes([len(text)]) + text.encode()
        body += bytes((start + len(body)) % 2)
    end = start + len(body)
    head = struct.pack(">6h", 0, -3, 0, 12 + len(turns), start, end)
    return HEADER + head + turns + b"\0\0" + body


def archive() -> dict[str, bytes]:
    texts = ["A lamp*24"] + ["x"] * 9 + ["Faye", "Bottle"]
    objects = struct.pack(">4h", 1, 2, 9, 10) + b"".join(
        struct.pack(">8h", name, *[0] * 7) for name in (2, 1, 0, 0, 0, 0, 0, 0, -2))
    return {
        "BOB1.DOG": dialogue(), "C1A.CUT": scene(), "QUEEN.JAS": HEADER + objects,
        "QUEEN2.JAS": "\r\n".join(texts).encode(),
    }


def test_the_table_gives_every_entry_and_damage_is_named() -> None:
    data = table({"A.SB": b"mp3", "LONGNAME1.SB": b"more"})
    assert game_archive.read_table(data) == {"A.SB": b"mp3", "LONGNAME1.SB": b"more"}
    for broken, message in ((b"ZIP" + data, "not the game's data file"), (data[:30], "cut within its table"),
                            (data[:-1], "cut within 'LONGNAME1.SB'")):
        with pytest.raises(PrepareError, match=message):
            game_archive.read_table(broken)


def test_remarks_are_numbered_from_41_and_answers_from_1() -> None:
    texts = ["seen*24", *["x"] * 1186, "locked*03*01"]
    found = {line.clip: line.text for line in game_archive.remarks(texts)}
    assert found["JOE00411"] == "seen" and found["JOE00011"] == "locked"


def test_a_dialogue_has_a_clip_a_piece() -> None:
    found = {line.clip: (line.speaker, line.text) for line in game_archive.dialogue("BOB1", dialogue()) if line.text}
    assert found == {
        "070000J2": ("joe", "Hi Bob!"), "070000J3": ("joe", "It's me."),
        "07SSSSJ2": ("joe", "Hi Bob!"), "07SSSSJ3": ("joe", "It's me."), "07000AJ1": ("joe", "Bye"),
        "070001P1": ("bob", "Caf\xe9?"), "070001P3": ("bob", "No."),
        "07XXXXP1": ("bob", "Again?"), "07XXXXJ1": ("joe", "Again."),
    }


@pytest.mark.parametrize("first", [b"\0", b"", string("*FR")], ids=["a zero", "nothing", "a text before the turns"])
def test_a_cut_scene_says_who_acts(first: bytes) -> None:
    objects = {0: "joe", 2: "faye", 9: "bottle"}
    found = {line.clip: (line.speaker, line.text)
             for line in game_archive.cut_scene("C1A", scene(first), objects) if line.text}
    assert found == {"C1A__022": ("faye", "Hey!"), "C1A__031": ("bottle", "Boo")}


def test_all_lines_of_an_archive_and_a_damaged_entry() -> None:
    entries = archive()
    found = {line.clip: line for line in game_archive.read_lines(entries)}
    assert found["C1A__022"].speaker == "faye" and found["C1A__031"].speaker == "bottle"
    assert found["JOE00411"].text == "A lamp"
    for name in ("BOB1.DOG", "C1A.CUT", "QUEEN.JAS"):
        with pytest.raises(PrepareError, match=f"{name} is missing or damaged"):
            list(game_archive.read_lines({**entries, name: entries[name][:60 if name.endswith("CUT") else 25]}))


def test_what_is_left_out_is_counted() -> None:
    spoken = {"JOE00411": "A lamp", "07SSSSJ2": "", "070001P1": "", "C1A__031": "", "ORPHAN01": "", "1000SSSS": ""}
    entries = archive() | {f"{name}.SB": b"mp3" for name in spoken}
    entries["QUEEN2.JAS"] = entries["QUEEN2.JAS"].replace(b"Bottle", b"note")
    dropped = defaultdict(list)
    lines = game_speech.choose_lines(entries, dropped)
    assert [(line.clip, line.speaker) for line in lines] == [
        ("070001P1", "bob"), ("07SSSSJ2", "joe"), ("JOE00411", "joe")]
    assert dropped == {"clips of nobody knows whom": ["C1A__031"], game_speech.NO_TEXT: ["ORPHAN01"]}


@pytest.mark.parametrize(("lines", "reason"), [
    ([Line("a", "joe", "Damn right!")], "clips that a family would not say aloud"),
    ([Line("a", "joe", "Mmfrt brtln")], "clips of sounds, not words"),
    ([Line("a", "joe", "Aaaargh")], "clips of sounds, not words"),
    ([Line("a", "ape", "Uh, oop ugga!")], "clips of sounds, not words"),
    ([Line("a", "joe", "Hmmm, Mrs Ironstein?")], ""),
    ([Line("a", "joe", "one"), Line("a", "joe", "two")], game_speech.TWO_TEXTS),
    ([Line("a", "joe", "one"), Line("a", "joe", "one")], ""),
])
def test_why_a_clip_is_left_out(lines: list[Line], reason: str) -> None:
    assert game_speech._fault(lines) == reason


def test_no_held_out_sentence_is_in_train(tmp_path: Path) -> None:
    write_manifest(tmp_path / "asr.test.jsonl", [Record("x", ("a.wav",), "asr", "Goodbye.")])
    lines = [Line("1", "faye", "Hello there"), Line("2", "joe", "hello, there!"), Line("3", "joe", "goodbye"),
             Line("4", "bud", "Hello there."), Line("5", "lou", "I see"), Line("6", "bob", "I see."),
             Line("7", "bob", "Fresh")]
    dropped = defaultdict(list)
    kept = game_speech.split_apart(lines, game_speech.held_out_sentences(tmp_path), dropped)
    assert [(line.clip, game_speech.split_of(line)) for line in kept] == [("1", "test"), ("5", "dev"), ("7", "train")]
    assert dropped == {"clips of train with a sentence of a held-out set": ["2", "3", "6"],
                       "clips of dev with a sentence of a held-out set": ["4"]}
