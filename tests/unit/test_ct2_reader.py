"""tools/demo_models/ct2_reader.py on a small file made here: what is read, and how damage is told."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_models import DemoModelError
from demo_models.ct2_reader import read_ct2

CODES = {"f4": 0, "i1": 1, "i2": 2, "i4": 3, "f2": 4}


def string(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(name: str, value: np.ndarray, code: int | None = None, size: int | None = None) -> bytes:
    """One variable; `code` and `size` lie about the type and the number of bytes."""
    kind = CODES[value.dtype.str[1:]] if code is None else code
    shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    return (
        string(name)
        + shape
        + struct.pack("<BI", kind, value.nbytes if size is None else size)
        + value.tobytes()
    )


def model(*variables: bytes, aliases: tuple[tuple[str, str], ...] = (), version: int = 6) -> bytes:
    head = struct.pack("<I", version) + string("TinySpec") + struct.pack("<II", 3, len(variables))
    tail = b"".join(string(alias) + string(name) for alias, name in aliases)
    return head + b"".join(variables) + struct.pack("<I", len(aliases)) + tail


VALUES = {
    "a/weight": np.arange(6, dtype="<f2").reshape(2, 3),
    "a/bias": np.array([-1.5, 2.5], dtype="<f4"),
    "heads": np.array(6, dtype="<i2"),
    "flag": np.array(-1, dtype="i1"),
    "ids": np.array([[70_000]], dtype="<i4"),
    "empty": np.zeros((0, 4), dtype="<f4"),
}
WHOLE = model(*(variable(n, v) for n, v in VALUES.items()), aliases=(("b/weight", "a/weight"),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def test_reads_every_type_shape_and_alias(path: Path) -> None:
    path.write_bytes(WHOLE)
    found = read_ct2(path)
    assert (found.spec, found.revision) == ("TinySpec", 3)
    assert set(found.variables) == {*VALUES, "b/weight"}
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found.variables[name], value, strict=True)
    np.testing.assert_array_equal(found.variables["b/weight"], VALUES["a/weight"])


def test_a_file_cut_anywhere_is_an_error_that_names_it(path: Path) -> None:
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(DemoModelError, match=r"model\.bin: is cut: .* offset \d+ .*fetch it again"):
            read_ct2(path)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (WHOLE + b"\0", "1 bytes follow"),
        (model(version=5), "version 5"),
        (model(variable("x", VALUES["a/bias"], code=5)), "type 5"),
        (model(variable("x", VALUES["a/bias"], size=4)), "can't have 4 bytes"),
        (model(string("x") + b"\x09"), "rank 9"),
        (model(aliases=(("y", "x"),)), "points to 'x'"),
        (model(variable("x", VALUES["a/bias"])).replace(b"x\0", b"xy"), "no closing zero"),
        (model(variable("x", VALUES["a/bias"])).replace(b"x\0", b"\xff\0"), "not UTF-8"),
        (struct.pack("<I", 6) + string("S") + struct.pack("<II", 3, 2**32 - 1), "is cut"),
        (model(string("x") + struct.pack("<B3IBI", 3, 2**31, 2**31, 2**31, 0, 2**32 - 1)), "can't have"),
    ],
)
def test_nonsense_is_an_error_that_names_the_file(path: Path, data: bytes, complaint: str) -> None:
    path.write_bytes(data)
    with pytest.raises(DemoModelError, match=rf"model\.bin: .*{complaint}"):
        read_ct2(path)
