"""A reader for CTranslate2's model.bin: plain arrays in, nothing executed, every length checked.

The layout, little-endian throughout: uint32 version, string spec, uint32 revision, uint32 count; for each
variable: string name, uint8 rank, rank x uint32 dimensions, uint8 type, uint32 bytes, data; then uint32 count
of aliases, each a string alias and a string name. A string is a uint16 length and that many bytes, the last
of them zero.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import DemoModelError

READABLE_VERSION = 6
MAX_RANK = 8
# The codes of ctranslate2::DataType. 5 is bfloat16, which numpy has no type for; no demo model uses it.
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}


@dataclass(frozen=True)
class Ct2Model:
    """What a model.bin holds."""

    spec: str
    """The kind of model, e.g. WhisperSpec."""
    revision: int
    """The revision of that spec."""
    variables: dict[str, npt.NDArray[Any]]
    """Every variable under its own name and under its aliases; read-only views of one buffer."""


class _Cursor:
    """Walks a buffer and refuses to step over its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; return where they start.

        Raises DemoModelError when the file ends before them.
        """
        start = self.at
        if size > len(self.data) - start:
            end = len(self.data)
            raise self.error(
                f"is cut: {what} needs {size} bytes at offset {start} and the file ends at {end}"
            )
        self.at = start + size
        return start

    def number(self, code: str, what: str) -> int:
        """Read one little-endian unsigned integer of struct type `code`."""
        start = self.take(struct.calcsize(code), what)
        return int(struct.unpack_from("<" + code, self.data, start)[0])

    def string(self, what: str) -> str:
        """Read a length-prefixed string and drop its closing zero."""
        length = self.number("H", f"the length of {what}")
        start = self.take(length, what)
        raw = self.data[start : start + length]
        if not raw.endswith(b"\0"):
            raise self.error(f"{what} at offset {start} has no closing zero")
        try:
            return raw[:-1].decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at offset {start} is not UTF-8") from None

    def error(self, reason: str) -> DemoModelError:
        """An error that names the file."""
        return DemoModelError(f"{self.path}: {reason}. Delete the file and fetch it again.")


def read_ct2(path: Path) -> Ct2Model:
    """Read a CTranslate2 model file of version 6.

    Raises DemoModelError, naming the file, when it is cut, has bytes left over, or has a version or type
    this reader doesn't know; OSError when it can't be read.
    """
    cursor = _Cursor(path)
    version = cursor.number("I", "the version")
    if version != READABLE_VERSION:
        raise cursor.error(f"CTranslate2 version {version}, this reader knows {READABLE_VERSION}")
    spec = cursor.string("the spec")
    revision = cursor.number("I", "the revision")
    # The counts are not trusted with any allocation: each loop ends at the first read past the end.
    variables: dict[str, npt.NDArray[Any]] = {}
    for _ in range(cursor.number("I", "the number of variables")):
        name, value = _variable(cursor)
        variables[name] = value
    for _ in range(cursor.number("I", "the number of aliases")):
        alias, name = cursor.string("an alias"), cursor.string("an alias's variable")
        if name not in variables:
            raise cursor.error(f"alias {alias!r} points to {name!r}, which is not in the file")
        variables[alias] = variables[name]
    if cursor.at != len(cursor.data):
        raise cursor.error(f"{len(cursor.data) - cursor.at} bytes follow the last alias")
    return Ct2Model(spec, revision, variables)


def _variable(cursor: _Cursor) -> tuple[str, npt.NDArray[Any]]:
    """Read one variable: its name and a read-only view of its data."""
    name = cursor.string("a variable's name")
    rank = cursor.number("B", f"the rank of {name!r}")
    if rank > MAX_RANK:
        raise cursor.error(f"{name!r} has rank {rank}, no variable has more than {MAX_RANK}")
    shape = tuple(cursor.number("I", f"a dimension of {name!r}") for _ in range(rank))
    code = cursor.number("B", f"the type of {name!r}")
    if code not in DTYPES:
        raise cursor.error(f"{name!r} has type {code}, this reader knows {sorted(DTYPES)}")
    size = cursor.number("I", f"the size of {name!r}")
    count = math.prod(shape)
    if count * DTYPES[code].itemsize != size:
        raise cursor.error(f"{name!r} of shape {shape} and type {DTYPES[code]} can't have {size} bytes")
    start = cursor.take(size, f"the data of {name!r}")
    return name, np.frombuffer(cursor.data, DTYPES[code], count, start).reshape(shape)
