"""Odd bytes, texts and trees, and how good ones are damaged."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

TEXTS = (
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "\0",
    "\ufeff",
    "\u2028",
    "\x85",
    "\ud800",
    "é",
    "e\u0301",
    "日本語",
    "हिन्दी",
    "🙂",
    "\u202e",
    "a" * 5000,
    '"',
    "'",
    "\\",
    "{}",
    "{instruction}",
    "${oc.env:HOME}",
    "???",
    "null",
    "~",
    "-",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "*",
    "$HOME",
    "%s",
    "\x1b[31m",
    "nan",
    "1e999",
    "0x10",
    "yes",
    "2026_11_28",
    "1:30",
    "# x",
    "a: b",
    "[",
    "}",
    "<|endoftext|>",
    "</s>",
    "asr",
    "<b>",
    "file\tname",
    "con",
    "-rf",
    "é.wav",
    "=",
    ",",
    "@",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    16,
    1000,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**62,
    2**63,
    2**64,
    10**40,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1e-300,
    1e300,
    1e999,
    -1e999,
    float("nan"),
    1e-9,
    29.99,
    30.0,
    30.01,
)
LITTLE = tuple(struct.pack("<I", n) for n in (0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE))


def data(chance: random.Random, content: bytes, times: int = 0) -> bytes:
    """Bytes after one to three damages (or `times`)."""
    for _ in range(times or chance.choice((1, 1, 2, 3))):
        if content:
            content = chance.choice(_DAMAGES)(chance, content)
    return content


def text(chance: random.Random) -> str:
    """An odd text, or a piece of several."""
    if chance.random() < 0.7:
        return chance.choice(TEXTS)
    return "".join(
        chance.choice((*TEXTS, *(chr(chance.randrange(0x3000)) for _ in range(9))))[:20]
        for _ in range(chance.randrange(1, 6))
    )


def value(chance: random.Random, depth: int = 0) -> Any:
    """Any value that JSON or YAML can spell."""
    pick = chance.random()
    if pick < 0.35:
        return text(chance)
    if pick < 0.65:
        return chance.choice(NUMBERS)
    if pick < 0.8 or depth > 3:
        return chance.choice((None, True, False))
    if pick < 0.83:
        nested: Any = []
        for _ in range(chance.choice((5, 9, 50, 200))):
            nested = [nested] if chance.random() < 0.5 else {"a": nested}
        return nested
    if pick < 0.92:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {text(chance): value(chance, depth + 1) for _ in range(chance.randrange(4))}


def tree(chance: random.Random, root: Any, times: int = 0) -> Any:
    """A deep copy of a JSON tree in which some places are changed: dropped, doubled, swapped, or another value."""
    root = json.loads(json.dumps(root))
    for _ in range(times or chance.choice((1, 1, 2, 4))):
        places = list(_places(root, 0))
        if not places:
            return value(chance)
        node, key = chance.choice(places)
        pick = chance.random()
        if pick < 0.2:
            del node[key]
        elif pick < 0.3 and isinstance(node, list):
            node.insert(chance.randrange(len(node) + 1), node[key])
        elif pick < 0.4 and isinstance(node, dict):
            node[text(chance)] = node[key]
        elif pick < 0.55:
            other, place = chance.choice(places)
            node[key] = json.loads(json.dumps(other[place])) if _has(other, place) else None
        elif pick < 0.7 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            node[key] = chance.choice(
                (node[key] + 1, node[key] - 1, -node[key], node[key] * 1000, node[key] + 0.5, str(node[key]))
            )
        elif pick < 0.8 and isinstance(node[key], str):
            at = chance.randrange(len(node[key]) + 1)
            node[key] = node[key][:at] + text(chance) + node[key][at:]
        else:
            node[key] = value(chance)
    return root


def to_json(chance: random.Random, root: Any) -> bytes:
    """A tree as JSON in some encoding; lone surrogates and NaN pass."""
    spelled = json.dumps(root, ensure_ascii=chance.random() < 0.5)
    encoding = chance.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "utf-16-le"))
    return spelled.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


def _places(node: Any, depth: int) -> Any:
    if depth > 20:
        return
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(pairs):
        yield node, key
        yield from _places(child, depth + 1)


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def _span(chance: random.Random, content: bytes) -> tuple[int, int]:
    start = chance.randrange(len(content))
    return start, min(len(content), start + chance.choice((1, 2, 4, 16, 100, 512, 4096, len(content))))


def _truncate(chance: random.Random, content: bytes) -> bytes:
    # Most formats have what matters at the front.
    return content[: chance.randrange(min(len(content), chance.choice((16, 64, 600, 10**9))))]


def _flip(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        changed[chance.randrange(min(len(changed), chance.choice((64, 600, 10**9))))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _fill(chance: random.Random, content: bytes) -> bytes:
    start, end = _span(chance, content)
    fill = chance.choice((b"\0", b"\xff", b" ", None))
    return content[:start] + (fill * (end - start) if fill else chance.randbytes(end - start)) + content[end:]


def _swap(chance: random.Random, content: bytes) -> bytes:
    a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    size = min(chance.choice((4, 64, 1024)), b - a)
    return (
        content[:a] + content[b - size : b] + content[a + size : b - size] + content[a : a + size] + content[b:]
        if b - a >= 2 * size
        else content[:a] + content[b:]
    )


def _drop(chance: random.Random, content: bytes) -> bytes:
    start, end = _span(chance, content)
    return content[:start] + content[end:]


def _double(chance: random.Random, content: bytes) -> bytes:
    start, end = _span(chance, content)
    return content[:end] + content[start:end] + content[end:]


def _insert(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.randbytes(chance.choice((1, 4, 100))) + content[at:]


def _number(chance: random.Random, content: bytes) -> bytes:
    """A length in the header, say, becomes a lie."""
    at = chance.randrange(min(len(content), chance.choice((64, 64, 200, 10**9))))
    number = chance.choice(LITTLE)
    return content[:at] + (number if chance.random() < 0.6 else number[::-1]) + content[at + 4 :]


def _append(chance: random.Random, content: bytes) -> bytes:
    return content + chance.choice((b"\0", b"\n", content[:100])) * chance.choice((1, 100, 5000))


_Damage = Callable[[random.Random, bytes], bytes]
_DAMAGES: tuple[_Damage, ...] = (
    _truncate,
    _truncate,
    _flip,
    _flip,
    _fill,
    _swap,
    _drop,
    _double,
    _insert,
    _number,
    _number,
    _append,
)
