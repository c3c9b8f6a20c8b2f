"""Hostile shards: index and sidecar agree with the tar, so only reading a sample can tell."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from listen_dist.data.shard_members import ShardError
from listen_dist.data.shard_writer import encode_features, encode_flac
from listen_dist.data.shards import ShardIndex

WIDTH = 8


class Payload:
    """What a pickle would run when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def hostile_set(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]], width: int = WIDTH) -> ShardIndex:
    """Write one shard of one sample `x` with these members, and an index and a sidecar that fit it."""
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    columns = {
        "id": ["x"],
        "offset": [0],
        "bytes": [end],
        "seconds": [0.5],
        "task": ["asr"],
        "text_chars": [12],
    }
    return index_for(folder, columns, width)


def index_for(folder: Path, columns: dict[str, list], width: int = WIDTH) -> ShardIndex:
    sidecar = json.dumps(columns).encode()
    (folder / "s.samples.json").write_bytes(sidecar)
    tar = (folder / "s.tar").read_bytes()
    shard = {"name": "s.tar", "samples": 1, "bytes": len(tar), "seconds": 0.5, "tasks": {"asr": 1}}
    shard |= {
        "sha256": hashlib.sha256(tar).hexdigest(),
        "samples_sha256": hashlib.sha256(sidecar).hexdigest(),
    }
    index = {"format_version": 1, "shards": [shard], "samples": 1, "seconds": 0.5, "tasks": {"asr": 1}}
    index |= {"languages": {"en": 1}, "skipped": 0}
    index["features"] = {"speech": {"fingerprint": "f", "width": width, "rate": 50}}
    (folder / "index.json").write_text(json.dumps(index))
    return ShardIndex.load(folder)


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


RECORD = json.dumps({"id": "x", "task": "asr", "target": "hi"}).encode()
FLAC = encode_flac(np.random.default_rng(0).uniform(-0.3, 0.3, 8_000))
FRAMES = encode_features(np.ones((25, WIDTH)))
GOOD = [member("x.flac", FLAC), member("x.json", RECORD), member("x.speech.npy", FRAMES)]
FLIPPED = FLAC[: len(FLAC) // 2] + bytes([FLAC[len(FLAC) // 2] ^ 16]) + FLAC[len(FLAC) // 2 + 1 :]

def pax(**records: str) -> tuple[tarfile.TarInfo, bytes]:
    """An extended header as `tar --format=pax` writes it before a member."""
    lines = [f" {key.replace('_', '.')}={value}\n" for key, value in records.items()]
    return member("PaxHeaders/x", "".join(f"{len(line) + 2}{line}" for line in lines).encode(), tarfile.XHDTYPE)


REMARKS = {
    "pax times": [part for row in GOOD for part in (pax(mtime="1700000000.5", atime="1700000000.5"), row)],
    "a Mac's attributes": [part for row in GOOD for part in (member(f"._{row[0].name}", b"\0\5\x16\7" * 50), row)],
}

HOSTILE = {
    "pax name": ([pax(mtime="1700000000.5"), *GOOD[:2], pax(path="../x.json"), GOOD[2]],
                 "a pax header sets 'path' of a tar member; write the shard with"),
    "pax size": ([pax(size="9999"), *GOOD], "a pax header sets 'size'"),
    "sparse": ([pax(GNU_sparse_major="1"), *GOOD], "a pax header sets 'GNU.sparse.major'"),
    "a link named as attributes": ([*GOOD, member("._x.json", kind=tarfile.SYMTYPE, linkname="x")], "type b'2'"),
    "pickle member": ([*GOOD, member("x.pickle", b"P")], "unexpected tar member 'x.pickle'"),
    "pyd member": ([*GOOD, member("x.pyd", b"P")], "unexpected tar member 'x.pyd'"),
    "pth member": ([*GOOD, member("x.pth", b"P")], "unexpected tar member 'x.pth'"),
    "dots": ([*GOOD, member("../x.json", RECORD)], r"unexpected tar member '\.\./x\.json'"),
    "absolute": ([*GOOD, member("/tmp/x.json", RECORD)], "unexpected tar member"),
    "another sample's": ([*GOOD, member("y.json", RECORD)], "unexpected tar member 'y.json'"),
    "twice": ([*GOOD, member("x.json", RECORD)], "unexpected tar member 'x.json'"),
    "symlink": ([member("x.flac", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), *GOOD[1:]], "type b'2'"),
    "hard link": ([member("x.flac", kind=tarfile.LNKTYPE, linkname="x.json"), *GOOD[1:]], "type b'1'"),
    "device": ([member("x.flac", kind=tarfile.CHRTYPE), *GOOD[1:]], "type b'3'"),
    "folder": ([member("x.flac", kind=tarfile.DIRTYPE), *GOOD[1:]], "type b'5'"),
    "no record": ([GOOD[0], GOOD[2]], r"its \.json member is missing"),
    "no audio": (GOOD[1:], "0 audio members"),
    "two audios": ([member("x.wav", FLAC), *GOOD], "2 audio members"),
    "no features": (GOOD[:2], "no stored features"),
    "record of another": ([GOOD[0], member("x.json", RECORD.replace(b'"x"', b'"y"')), GOOD[2]], "is of 'y'"),
    "record not UTF-8": ([GOOD[0], member("x.json", b"\xff" + RECORD), GOOD[2]], "not UTF-8"),
    "record a bomb": ([GOOD[0], member("x.json", b"[" * 500_000), GOOD[2]], "nested too deeply"),
    "record 2 MB": ([GOOD[0], member("x.json", b" " * 2_000_000), GOOD[2]], "claims 2000000 bytes"),
    "unknown task": (
        [GOOD[0], member("x.json", RECORD.replace(b"asr", b"azr")), GOOD[2]],
        "unknown task 'azr'",
    ),
    "no question": ([GOOD[0], member("x.json", RECORD.replace(b"asr", b"speech_qa")), GOOD[2]], "needs `question`"),
    "no answer": ([GOOD[0], member("x.json", RECORD.replace(b'"hi"', b'""')), GOOD[2]], "key 'target' is empty"),
    "flipped FLAC": ([member("x.flac", FLIPPED), *GOOD[1:]], "damaged"),
    "empty FLAC": ([member("x.flac"), *GOOD[1:]], "empty file"),
    "features wide": (
        [*GOOD[:2], member("x.speech.npy", encode_features(np.ones((5, 9))))],
        "expected float16",
    ),
    "features cut": ([*GOOD[:2], member("x.speech.npy", FRAMES[:-2])], "hold 398 bytes"),
    "features NaN": (
        [*GOOD[:2], member("x.speech.npy", encode_features(np.full((5, 8), np.nan)))],
        "not finite",
    ),
    "features no npy": ([*GOOD[:2], member("x.speech.npy", b"junk")], "no .npy array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(tmp_path: Path, name: str) -> None:
    members, message = HOSTILE[name]
    index = hostile_set(tmp_path / "set", members)
    with pytest.raises(ShardError, match=rf"s\.tar: sample 'x': .*{message}"):
        index.read_sample(0, 0, want="both")


def test_good_members_pass_the_same_road(tmp_path: Path) -> None:
    sample = hostile_set(tmp_path / "set", GOOD).read_sample(0, 0, want="both")
    assert sample.record.target == "hi"


@pytest.mark.parametrize("name", REMARKS)
def test_what_other_programs_add_to_a_tar_is_passed_over(tmp_path: Path, name: str) -> None:
    sample = hostile_set(tmp_path / "set", REMARKS[name]).read_sample(0, 0, want="both")
    assert sample.record.target == "hi" and sample.waveform is not None


@pytest.mark.parametrize("suffix", ["pickle", "pyd", "pth", "speech.npy", "json"])
def test_no_payload_is_ever_unpickled(tmp_path: Path, suffix: str) -> None:
    owned = tmp_path / "owned"
    content = pickle.dumps(Payload(owned))
    if suffix == "speech.npy":
        file = io.BytesIO()
        np.save(file, np.array([[Payload(owned)]], dtype=object), allow_pickle=True)
        content = file.getvalue()
        with pytest.raises(ValueError, match="allow_pickle"):
            np.load(io.BytesIO(content), allow_pickle=False)
    others = [row for row in GOOD if row[0].name != f"x.{suffix}"]
    index = hostile_set(tmp_path / "set", [*others, member(f"x.{suffix}", content)])
    with pytest.raises(ShardError):
        index.read_sample(0, 0, want="both")
    assert not owned.exists()
    pickle.loads(pickle.dumps(Payload(owned)))
    assert owned.exists(), "the payload itself works, so the test can fail"


def test_features_that_claim_a_terabyte_reserve_no_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f2", "fortran_order": False, "shape": (10**11, WIDTH)}
    )
    index = hostile_set(tmp_path / "set", [*GOOD[:2], member("x.speech.npy", header.getvalue() + bytes(64))])
    with pytest.raises(ShardError, match="hold 64 bytes"):
        index.read_sample(0, 0, want="both")


def test_garbage_between_members_is_an_error(tmp_path: Path) -> None:
    index = hostile_set(tmp_path / "set", GOOD)
    path = tmp_path / "set/s.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"x.json")
    content[place : place + 512] = random.Random(0).randbytes(512)
    path.write_bytes(content)
    with pytest.raises(ShardError, match="garbage after its last tar member"):
        index.read_sample(0, 0)


BAD_COLUMNS = {
    "outside": ({"offset": [10**6]}, "reach outside the tar"),
    "negative": ({"offset": [-512]}, "reach outside the tar"),
    "text": ({"offset": ["0"]}, "key 'offset': expected only int"),
    "too big": ({"bytes": [10**30]}, "key 'bytes': expected only int"),
    "NaN": ({"seconds": [float("nan")]}, "key 'seconds': expected only float"),
    "rows": ({"task": ["asr", "asr"]}, "key 'task': 2 rows, the index says 1"),
    "id": ({"id": ["../x"]}, "is not a safe name"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_sidecar_is_refused(tmp_path: Path, name: str) -> None:
    hostile_set(tmp_path / "set", GOOD)
    change, message = BAD_COLUMNS[name]
    columns = json.loads((tmp_path / "set/s.samples.json").read_text()) | change
    index = index_for(tmp_path / "set", columns)
    with pytest.raises(ShardError, match=message):
        index.shard_table(0)


def test_random_damage_is_a_shard_error_or_the_same_sample(tmp_path: Path) -> None:
    index = hostile_set(tmp_path / "set", GOOD)
    path = tmp_path / "set/s.tar"
    good = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 4, 64])):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            index.read_sample(0, 0, want="both")
        except ShardError:
            refused += 1
    assert refused > 150
