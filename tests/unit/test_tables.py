"""The tables of all recipes: byte order marks, line ends of every sort, NUL, stray quotes; a case a row."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipes import TOOLS, PrepareError

sys.path.insert(0, str(TOOLS / "prepare"))

import audiocaps
import clotho
import covost2
import iemocap
import librispeech
import librisqa
import voxceleb1


@dataclass(frozen=True)
class Table:
    """A recipe's table with three rows: which file, its lines (each row holds `{}` for a text), how it is read."""

    file: str
    header: str
    row: str
    read: Callable[[Path], list[str]]
    quotes: bool = False
    """A `"` has a meaning."""


def of_audiocaps(folder: Path) -> list[str]:
    return [record.target for record in audiocaps.read_split(argparse.Namespace(
        folder=folder, audio=audiocaps.AUDIO, skip_missing=False), "test")]


def of_clotho(folder: Path) -> list[str]:
    (folder / "evaluation").mkdir(exist_ok=True)
    return [record.references[1] for record in clotho.read_split(folder, "test")]


def of_voxceleb(folder: Path) -> list[str]:
    return [first for first, _, _ in voxceleb1.read_trials(folder / "veri_test2.txt")]


TABLES = {
    "audiocaps": Table("test.csv", "audiocap_id,youtube_id,start_time,caption", "{number},y{number},0,{text}",
                       of_audiocaps, quotes=True),
    "clotho": Table("clotho_captions_evaluation.csv", "file_name,caption_1,caption_2,caption_3,caption_4,caption_5",
                    "{number}.wav,a,{text},c,d,e", of_clotho, quotes=True),
    "covost2": Table("covost_v2.en_zh-CN.test.tsv", "path\tsentence\ttranslation\tclient_id",
                     "{number}.mp3\ta\t{text}\tx", lambda folder: [
                         record.target for record in covost2.read_split(folder, "test")]),
    "librispeech": Table("1-2.trans.txt", "1-2-0000 nothing", "1-2-000{number} {text}", lambda folder: [
        text for _, text in librispeech.read_transcripts(folder / "1-2.trans.txt")][1:]),
    "iemocap": Table("Ses01F_a.txt", "% header", "[1.0 - 2.0]\tSes01F_a_F00{number}\tneu\t[2.5, 2.5, 2.5]\nC-E: {text}",
                     lambda folder: [turn for turn, _, _ in iemocap.read_turns(folder / "Ses01F_a.txt")]),
    "voxceleb1": Table("veri_test2.txt", "1 id10270/a/1.wav id10270/b/1.wav",
                       "0 id10270/a/{number}.wav id10271/b/1.wav", lambda folder: of_voxceleb(folder)[1:]),
}
WITH_TEXT = [name for name, table in TABLES.items() if name not in ("iemocap", "voxceleb1")]
TEXTS = ("a dog barks", "more é", "rain")


def write(folder: Path, table: Table, texts: tuple[str, ...] = TEXTS, end: str = "\n", start: str = "") -> Path:
    rows = [table.row.format(number=number, text=text) for number, text in enumerate(texts, 1)]
    content = start + "".join(f"{line}{end}" for line in "\n".join([table.header, *rows]).split("\n"))
    (folder / table.file).write_bytes(content.encode("utf-8", "surrogateescape"))
    return folder / table.file


@pytest.mark.parametrize("name", TABLES)
def test_marks_and_line_ends_change_nothing(name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    write(tmp_path, table)
    plain = table.read(tmp_path)
    assert len(plain) == 3 and (name not in WITH_TEXT or plain == list(TEXTS))
    for end, start in (("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")):
        write(tmp_path, table, end=end, start=start)
        assert table.read(tmp_path) == plain


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
@pytest.mark.parametrize("name", WITH_TEXT)
def test_what_others_take_for_a_line_end_becomes_a_space(name: str, sign: str, tmp_path: Path) -> None:
    write(tmp_path, TABLES[name], ("a", f"b{sign}c", "d"))
    assert TABLES[name].read(tmp_path) == ["a", "b c", "d"]


@pytest.mark.parametrize(("text", "message"), [
    ("a\0b", "NUL bytes within a line"), ("a\rb", "a carriage return within a line"), ("a\udcffb", "not UTF-8")])
@pytest.mark.parametrize("name", TABLES)
def test_damage_is_named_by_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    table = TABLES[name]
    if name == "iemocap" and "UTF-8" in message:
        pytest.skip("annotators' comments may be in any encoding")
    if name == "voxceleb1":
        table = Table(table.file, table.header, table.row.replace("id10271", "{text}"), table.read)
    path = write(tmp_path, table, (TEXTS[0] if name in WITH_TEXT else "id10271", text, "c"))
    line = 5 if name == "iemocap" else 3
    with pytest.raises(PrepareError, match=rf"^{path}:{line}: {message}"):
        table.read(tmp_path)


@pytest.mark.parametrize("name", [name for name in WITH_TEXT if TABLES[name].quotes])
def test_a_quote_that_would_swallow_rows_is_named_where_it_opens(name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    opened = "a quote opens a field here that does not end on its line"
    for place in range(3):  # to the end of the file, or of the last line
        texts = tuple('"' * (number == place) + text for number, text in enumerate(TEXTS))
        path = write(tmp_path, table, texts)
        with pytest.raises(PrepareError, match=rf"^{path}:{place + 2}: {opened}"):
            table.read(tmp_path)
    path = write(tmp_path, table, ('"swallows', 'closed"', "c"))  # a field over two lines, well-formed as csv
    with pytest.raises(PrepareError, match=rf"^{path}:2: {opened}"):
        table.read(tmp_path)
    path = write(tmp_path, table, ("a", '"said" he', "c"))  # quotes would be lost
    with pytest.raises(PrepareError, match=rf"^{path}:3: .* expected after"):
        table.read(tmp_path)
    write(tmp_path, table, ('"a ""b"", c"', 'inside " one', "c"))
    assert table.read(tmp_path)[:2] == ['a "b", c', 'inside " one']


@pytest.mark.parametrize("name", [name for name in WITH_TEXT if not TABLES[name].quotes])
def test_a_quote_is_a_letter_where_the_set_has_no_quoting(name: str, tmp_path: Path) -> None:
    write(tmp_path, TABLES[name], ('"a', 'b"', "c"))
    assert TABLES[name].read(tmp_path) == ['"a', 'b"', "c"]


def test_questions_of_librisqa(tmp_path: Path) -> None:
    (tmp_path / "LibriSQA-PartI").mkdir()
    entry = {"speech_path": "a/1-2-0000.wav", "question": "Who\u2028is \"it\"?", "answer": "A\x85man."}
    for split in ("train", "test"):
        path = tmp_path / f"LibriSQA-PartI/LibriSQA-PartI-{split}.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps([entry], ensure_ascii=False).encode())
    options = argparse.Namespace(folder=tmp_path, librispeech=tmp_path)
    (record,) = librisqa.read_part(options, 1)["test"]
    assert (record.question, record.target) == ('Who is "it"?', "A man.")
