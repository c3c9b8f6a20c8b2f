"""Manifests: what is written is read, and every bad line is named with file, line, key and cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listen_dist.data.manifest import (
    MAX_LINE_BYTES,
    ManifestError,
    read_manifest,
    record_from_json,
    write_manifest,
)
from listen_dist.errors import ListenError
from listen_dist.structures import Record

GOOD = {"id": "a1", "audio": "wav/a.wav", "task": "asr", "target": "hello"}


def write_lines(folder: Path, *lines: bytes) -> Path:
    path = folder / "m.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_round_trip_with_paths_relative_to_the_manifest(tmp_path: Path) -> None:
    records = [
        Record(id="a1", audio=(str(tmp_path / "wav/a.wav"),), task="asr", target="größer", duration=1.5),
        Record(
            id="p1",
            audio=(str(tmp_path / "a.wav"), str(tmp_path / "b.wav")),
            task="speaker_verification",
            target="yes",
            meta={"kind": "en-en", "choices": ["yes", "no"]},
        ),
        Record(
            id="c1", audio=(str(tmp_path / "c.wav"),), task="caption", references=("a dog", "a dog barks")
        ),
        Record(
            id="q1",
            audio=("/abs/q.wav",),
            task="speech_qa",
            target="no",
            question="Is it?",
            language="en",
            split="dev",
        ),
    ]
    path = tmp_path / "sub" / "m.jsonl"
    assert write_manifest(path, records) == 4
    assert list(read_manifest(path)) == records
    assert json.loads(path.read_text().splitlines()[0])["audio"] == "../wav/a.wav"
    assert [p.name for p in path.parent.iterdir()] == ["m.jsonl"], "no temporary file is left"


def test_empty_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path, json.dumps(GOOD).encode(), b"", b"{")
    with pytest.raises(ManifestError, match=r"m\.jsonl:3: not JSON"):
        list(read_manifest(path))


def test_marks_and_line_ends_change_nothing(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": name, "target": "über\u2028zwei"} for name in ("a", "b")]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    expected = list(read_manifest(write_lines(tmp_path, *lines)))
    assert [record.target for record in expected] == ["über\u2028zwei"] * 2
    for start, end in ((b"\xef\xbb\xbf", b"\n"), (b"\xef\xbb\xbf", b"\r\n"), (b"", b"\r\n")):
        (tmp_path / "m.jsonl").write_bytes(start + end.join([*lines, b""]))
        assert list(read_manifest(tmp_path / "m.jsonl")) == expected


@pytest.mark.parametrize(("content", "message"), [
    (b"path,text\na.wav,hello\n", r"this looks like a table \(csv or tsv\)"),
    (b"\xef\xbb\xbfpath\ttext\n", r"this looks like a table \(csv or tsv\)"),
    (b"PAR1\x15\x04", "this is a parquet file"),
    (b"\x1f\x8b\x08", r"this is a gzip file \(unpack it\)"),
    (json.dumps([GOOD]).encode(), "this is one JSON list"),
    (json.dumps([GOOD], indent=1).encode(), "this is one JSON list"),
    (json.dumps(GOOD, indent=1).encode(), "this is JSON over several lines"),
    (json.dumps(GOOD).encode("utf-16"), r"this is UTF-16 text \(write it as UTF-8\)"),
])
def test_another_format_is_called_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match=rf"^{tmp_path}/m\.jsonl: {message}; a manifest is JSON lines: "):
        list(read_manifest(tmp_path / "m.jsonl"))
    with pytest.raises(ManifestError, match=rf"^{tmp_path}: is a folder; name the manifest"):
        list(read_manifest(tmp_path))


BAD: list[tuple[str, object, str]] = [
    ("not json", b"{'id': 1}", "not JSON: .* at column 2"),
    ("NUL", json.dumps(GOOD).encode() + b"\0" * 9, "not JSON: holds NUL bytes"),
    ("NUL as JSON spells it", {"target": "a\0b"}, "key 'target': expected text"),
    ("a list", b"[1]", "expected a JSON object, found list"),
    ("not utf-8", json.dumps(GOOD).encode() + b"\xff", "not UTF-8 at byte"),
    ("deep", b"[" * 100_000, "nested too deeply"),
    ("huge number", b'{"id": ' + b"1" * 5000 + b"}", "a number of thousands of digits"),
    ("deep meta", {"meta": {"a": [[[[[[[[[[1]]]]]]]]]]}}, "key 'meta': nested deeper than 8"),
    ("nan", b'{"id": "a", "duration": NaN}', "not JSON: NaN"),
    ("no id", {"id": None}, "key 'id' is missing"),
    ("no audio", {"audio": []}, "key 'audio' is missing or empty"),
    ("no task", {"task": ""}, "key 'task' is missing"),
    ("unknown task", {"task": "azr"}, "key 'task': unknown task 'azr': did you mean 'asr'"),
    ("misspelt key", {"tagret": "x"}, "unknown key 'tagret': did you mean 'target'"),
    ("empty target", {"target": " "}, "key 'target' is empty and there are no 'references'"),
    ("empty reference", {"references": [""]}, "key 'references': expected a list of non-empty texts"),
    ("dotted id", {"id": "a.b"}, "key 'id': 'a.b' is not a safe name"),
    ("id with a slash", {"id": "../a"}, "is not a safe name"),
    ("long id", {"id": "a" * 81}, "is not a safe name"),
    ("id with a line break", {"id": "a\n"}, "is not a safe name"),
    ("id is a number", {"id": 7}, "key 'id': expected text, found 7"),
    ("target is a list", {"target": ["a"]}, "key 'target': expected text"),
    ("lone surrogate", {"target": "\ud800"}, "key 'target': expected text"),
    ("audio is a number", {"audio": 3}, "key 'audio': expected a list of non-empty texts"),
    ("an address", {"audio": "https://host/a.wav"}, "key 'audio': 'https://host/a.wav' is an address; download it"),
    ("two paths for asr", {"audio": ["a", "b"]}, "task 'asr' needs 1 path"),
    (
        "one path for pairs",
        {"task": "speaker_verification"},
        r"task 'speaker_verification' needs 2 path\(s\), found 1",
    ),
    ("negative duration", {"duration": -1}, "key 'duration': expected seconds above 0"),
    ("huge duration", {"duration": 10**400}, "key 'duration'"),
    ("duration is a bool", {"duration": True}, "key 'duration'"),
    ("meta is a list", {"meta": []}, "key 'meta': expected an object"),
    ("choices twice", {"task": "emotion", "target": "a", "meta": {"choices": ["a", "b", "a"]}},
     r"record 'a1': meta\.choices = \['a', 'b', 'a'\] is no list of two or more different texts"),
    ("an answer of none", {"task": "emotion", "target": "c", "meta": {"choices": ["a", "b"]}},
     "the answer 'c' is not among the choices"),
    ("neither yes nor no", {"task": "speaker_verification", "audio": ["a", "b"], "target": "Yes"},
     "the answer 'Yes' is not among the choices"),
    ("a blank among references", {"target": "", "references": ["x", " "]}, "key 'target' is empty"),
    ("question missing", {"task": "speech_qa"}, "needs `question` or `instruction`"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_line_is_named(tmp_path: Path, change: object, message: str) -> None:
    line = change if isinstance(change, bytes) else json.dumps({**GOOD, **change}).encode()  # type: ignore[dict-item]
    path = write_lines(tmp_path, json.dumps({**GOOD, "id": "first"}).encode(), line)
    with pytest.raises(ManifestError, match=rf"^{path}:2: .*{message}"):
        list(read_manifest(path))


def test_choices_are_checked_when_shards_are_built_not_when_they_are_read(tmp_path: Path) -> None:
    """Evaluation names and counts such samples of older shards; training can use them."""
    fields = {"id": "a1", "task": "emotion", "target": "c", "meta": {"choices": ["a", "b"]}}
    assert record_from_json(json.dumps(fields).encode(), need_audio=False).target == "c"
    with pytest.raises(ListenError, match="not among the choices"):
        write_manifest(tmp_path / "m.jsonl", [Record("a1", ("/a.wav",), "emotion", "c", meta={"choices": ["a", "b"]})])


def test_an_empty_target_is_right_where_the_record_says_that_nothing_is_said(tmp_path: Path) -> None:
    silent = Record("s", (str(tmp_path / "a.wav"),), "asr", meta={"no_speech": True})
    write_manifest(tmp_path / "m.jsonl", [silent])
    assert list(read_manifest(tmp_path / "m.jsonl")) == [silent] and silent.answers == ("",)
    for change, message in (({"target": "hm", "meta": {"no_speech": True}}, "no_speech is true, but .*says 'hm'"),
                            ({"target": "", "meta": {"no_speech": 1}}, "'target' is empty.*meta.no_speech: true"),
                            ({"target": "", "task": "caption", "meta": {"no_speech": True}}, "'target' is empty")):
        with pytest.raises(ManifestError, match=message):
            record_from_json(json.dumps({**GOOD, **change}).encode())


def test_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    with pytest.raises(ManifestError, match=r"m\.jsonl:2: key 'id': 'a1' stands in line 1 too"):
        list(read_manifest(write_lines(tmp_path, line, line)))


def test_long_line_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = write_lines(tmp_path, b'{"id": "' + b"a" * MAX_LINE_BYTES)
    with pytest.raises(ManifestError, match=r"m\.jsonl:1: line longer than"):
        list(read_manifest(path))


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = Record(id="a1", audio=("/a.wav",), task="asr", target="x")
    write_manifest(path, [good])
    before = path.read_bytes()
    with pytest.raises(ManifestError, match="not a safe name"):
        write_manifest(path, [good, Record(id="a.b", audio=("/a.wav",), task="asr", target="x")])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["id", "audio", "task", "target", "references", "duration", "meta", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("asr"),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_json_is_a_record_or_a_manifest_error(fields: dict[str, object]) -> None:
    try:
        record_from_json(json.dumps(fields).encode())
    except ManifestError:
        pass
