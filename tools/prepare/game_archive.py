"""A reader for the data file of "Flight of the Amazon Queen": bytes in, clips with their texts and speakers out.

Pure functions; all numbers in the file are big-endian, all texts Latin-1. The file begins with a table: 13 bytes of
header, uint16 count, then 21 bytes an entry: name (12, zero-filled), one byte, uint32 offset, uint32 size. Of its
entries we read

    *.SB         an MP3 each
    *.DOG        a dialogue between Joe, the hero, and the person the file is named after
    *.CUT        a cut scene: objects that act in turn, each with a text
    QUEEN2.JAS   lines of text: Joe's remarks, names of objects
    QUEEN.JAS    numbers: which object has which name

`*XX` inside a text is a command of the game (a pose, a place). It splits the text into pieces, and a piece is a clip of
its own, numbered in hex from 1 at the end of its name; pieces without words count too.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from recipe import PrepareError

TABLE, ENTRY = 15, 21
"""Where the table's entries begin, and bytes of one."""
HEADER = 20
"""Bytes before the contents of a .DOG, .CUT or .JAS entry."""
HERO, NARRATOR = "joe", "narrator"
_COMMAND = re.compile(r"\*XY\d\d\(\d+,\d+\)|\*..", re.DOTALL)
_FRAME = 20
"""Bytes of a frame of an object's animation in a cut scene."""
_REMARKS, _ANSWERS = 41, 1187
"""Number of the remark in the first line; line, counted from 0, of the one with number 1."""


@dataclass(frozen=True)
class Line:
    """A clip's name without suffix, who speaks, and what."""

    clip: str
    speaker: str
    text: str


def read_table(data: bytes) -> dict[str, bytes]:
    """Return name → content of all entries.

    Raises:
        PrepareError: not that file, or cut.
    """
    if data[:4] != b"QTBL":
        raise PrepareError("queen.1c: not the game's data file; delete it and run again")
    entries = {}
    try:
        (count,) = struct.unpack_from(">H", data, TABLE - 2)
        for start in range(TABLE, TABLE + ENTRY * count, ENTRY):
            raw, offset, size = struct.unpack_from(">12sxII", data, start)
            name = raw.partition(b"\0")[0].decode("latin-1")
            entries[name] = content = data[offset : offset + size]
            if len(content) != size:
                raise PrepareError(f"queen.1c: cut within {name!r}; delete it and run again")
    except struct.error:
        raise PrepareError("queen.1c: cut within its table; delete it and run again") from None
    return entries


def read_lines(entries: dict[str, bytes]) -> Iterator[Line]:
    """Yield every piece of text with the name its clip would have, whether there is such a clip or not.

    Raises:
        PrepareError: an entry is missing or damaged; it is named.
    """
    name = "QUEEN2.JAS"
    try:
        texts = entries[name].decode("latin-1").split("\r\n")
        yield from remarks(texts)
        name = "QUEEN.JAS"
        objects = object_names(entries[name], texts)
        for name, content in entries.items():
            stem, _, kind = name.rpartition(".")
            if kind == "DOG":
                yield from dialogue(stem, content)
            elif kind == "CUT":
                yield from cut_scene(stem, content, objects)
    except (KeyError, IndexError, struct.error) as error:
        reason = f"{name} is missing or damaged ({error!r})"
        raise PrepareError(f"queen.1c: {reason}; delete the file and run again") from None


def pieces(text: str) -> list[str]:
    """Return a text's pieces between commands, empty ones too.

    >>> pieces("*FLHello!*03")
    ['', 'Hello!', '']
    """
    return [piece.strip() for piece in _COMMAND.split(text)]


def remarks(texts: list[str]) -> Iterator[Line]:
    """Joe's remarks on what he sees: JOE, number (four digits), piece."""
    for line, text in enumerate(texts):
        is_answer = _ANSWERS <= line < _ANSWERS + _REMARKS - 1
        number = line - _ANSWERS + 1 if is_answer else line + _REMARKS
        yield from _numbered(f"JOE{number:04d}", HERO, text)


def dialogue(name: str, content: bytes) -> Iterator[Line]:
    """Talk key (two digits), id (four hex digits), J (Joe) or P (the other one), piece.

    Joe's string of id 0 opens the dialogue, under the id SSSS; two strings (XXXX) open it when they meet again.
    """
    person = re.sub(r"\d+$", "", name).lower()
    speakers = {"J": HERO, "P": person}
    levels, key, joes, persons = (_int16(content, HEADER + at) for at in (0, 4, 6, 8))
    answers, again = (_uint16(content, HEADER + at) for at in (22, 26))
    for side, start, count in (("J", 32 + 96 * abs(levels), joes), ("P", answers, persons)):
        for number, text in _strings_with_id(content, start, count):
            yield from _numbered(f"{key:02d}{number:04X}{side}", speakers[side], text)
            if number == 0:
                yield from _numbered(f"{key:02d}SSSS{side}", speakers[side], text)
    for side, text in zip("PJ", _strings(content, again, 2), strict=False):
        yield from _numbered(f"{key:02d}XXXX{side}", speakers[side], text)


def cut_scene(name: str, content: bytes, objects: dict[int, str]) -> Iterator[Line]:
    """The first five letters of the scene's name filled with `_`, number of the object's turn (two digits), piece."""
    turns, first = (abs(_int16(content, HEADER + 2)), _uint16(content, HEADER + 8))
    texts = _strings(content, first, end=_uint16(content, HEADER + 10))
    texts = texts[max(0, len(texts) - turns) :]  # some scenes begin with one that is no turn's
    for number, (actor, text) in enumerate(zip(_actors(content, turns), texts, strict=False), 1):
        yield from _numbered(f"{name[:5]:_<5}{number:02d}", objects.get(actor, NARRATOR), text)


def object_names(content: bytes, texts: list[str]) -> dict[int, str]:
    """Object → its name in lower case: 0 is Joe; 16 bytes an object, the first two say which name."""
    _, _, count, descriptions = struct.unpack_from(">4h", content, HEADER)
    numbers = (abs(_int16(content, HEADER + 8 + 16 * place)) for place in range(count))
    return {0: HERO} | {place: texts[descriptions + number - 1].lower()
                        for place, number in enumerate(numbers, 1) if number}


def _actors(content: bytes, turns: int) -> Iterator[int]:
    """Who acts in each turn: 17 numbers, how many people come on and who, frames up to a −2 where the sixth says so."""
    at = HEADER + 12
    for _ in range(turns):
        yield _int16(content, at)
        has_frames = _int16(content, at + 10)
        at += 36 + 2 * _uint16(content, at + 34)
        if has_frames:
            while _int16(content, at) != -2:
                at += _FRAME
            at += 2


def _numbered(clip: str, speaker: str, text: str) -> Iterator[Line]:
    for number, piece in enumerate(pieces(text), 1):
        yield Line(f"{clip}{number:X}", speaker, piece)


def _strings_with_id(content: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    """2 bytes of something, int16 id, length byte, text; the end rounded up to a multiple of 4."""
    for _ in range(count):
        number, text = _uint16(content, HEADER + at + 2), _text(content, at + 4)
        yield number, text
        at += -(-(5 + len(text)) // 4) * 4


def _strings(content: bytes, at: int, count: int = -1, end: int = 0) -> list[str]:
    """Length byte and text, the end rounded up to a multiple of 2; up to `count` of them or up to `end`."""
    texts: list[str] = []
    while len(texts) < count or at < end:
        text = _text(content, at)
        if text or count >= 0:
            texts.append(text)
        at += 1 + len(text)
        if text:
            at += at % 2
    return texts


def _text(content: bytes, at: int) -> str:
    start = HEADER + at + 1
    text = content[start : start + content[start - 1]]
    if len(text) != content[start - 1]:
        raise IndexError(f"a text of {content[start - 1]} bytes at {at}")
    return text.decode("latin-1")


def _int16(content: bytes, at: int) -> int:
    return int(struct.unpack_from(">h", content, at)[0])


def _uint16(content: bytes, at: int) -> int:
    return int(struct.unpack_from(">H", content, at)[0])
