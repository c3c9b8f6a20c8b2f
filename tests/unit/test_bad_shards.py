"""Every kind of bad input, as real bytes and on the way that training takes: refused, or skipped, named and counted.

Each set holds the samples `a`, `x`, `b`; `x` is spoilt, and index and sidecar are made to fit, as their author
would. test_hostile_shards.py goes through more members one by one, test_decode.py through more audio.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from listen_dist.data import shards
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader
from listen_dist.data.schedule import SampleRef
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shard_writer import encode_flac
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.models.llm import load_tokenizer
from listen_dist.structures import Batch
from tests import tiny
from tests.unit.test_hostile_shards import Payload, member

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

Member = tuple[tarfile.TarInfo, bytes]
WAVE = np.random.default_rng(0).uniform(-0.3, 0.3, 8_000).astype(np.float32)
FLAC = encode_flac(WAVE)


def record(name: str) -> bytes:
    return json.dumps({"id": name, "task": "asr", "target": "hold the line"}).encode()


JSON = member("x.json", record("x"))


def write_set(folder: Path, members: list[Member], edit: Callable[[bytearray], bytearray] = lambda tar: tar) -> Path:
    """One shard of `a`, `x` (these members) and `b`; its bytes are edited before the index is made."""
    folder.mkdir()
    file, starts = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a", "x", "b"):
            starts.append(tar.offset)
            good = [member(f"{name}.flac", FLAC), member(f"{name}.json", record(name))]
            for info, content in members if name == "x" else good:
                if info.size == len(content):
                    tar.addfile(info, io.BytesIO(content))
                else:  # a header that lies
                    tar.addfile(info)
                    tar.fileobj.write(content + bytes(-len(content) % 512))  # type: ignore[union-attr]
                    tar.offset += len(content) + -len(content) % 512
        ends = [*starts[1:], tar.offset]
    columns = {"id": ["a", "x", "b"], "offset": starts, "bytes": [e - s for s, e in zip(starts, ends, strict=True)],
               "seconds": [0.5] * 3, "task": ["asr"] * 3, "text_chars": [24] * 3}
    (folder / "s.tar").write_bytes(edit(bytearray(file.getvalue())))
    write_index(folder, columns)
    return folder


def write_index(folder: Path, columns: dict[str, list[Any]], **changes: object) -> None:
    sidecar, tar = json.dumps(columns).encode(), (folder / "s.tar").read_bytes()
    (folder / "s.samples.json").write_bytes(sidecar)
    shard = {"name": "s.tar", "samples": 3, "bytes": len(tar), "seconds": 1.5, "tasks": {"asr": 3},
             "sha256": hashlib.sha256(tar).hexdigest(), "samples_sha256": hashlib.sha256(sidecar).hexdigest()}
    index = {"format_version": 1, "shards": [shard | changes], "samples": 3, "seconds": 1.5, "tasks": {"asr": 3},
             "languages": {}, "skipped": 0, "features": None}
    (folder / "index.json").write_text(json.dumps(index))


def columns_of(folder: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = json.loads((folder / "s.samples.json").read_text())
    return columns


@pytest.fixture(scope="module")
def read(tiny_world: tiny.Tiny) -> Callable[[Path], Batch]:
    """All samples of a set as one batch, on the way that training reads them."""
    config = tiny_world.config()
    text = TextEncoder(load_tokenizer(config.model.llm), config.model)
    log_mel = LogMel.from_pretrained(config.model.speech_encoder)

    def reader(folder: Path) -> Batch:
        shards._read_table.cache_clear()
        index = ShardIndex.load(folder)
        refs = [SampleRef(0, 0, row) for row in range(index.samples)]
        return BatchReader([index], log_mel, text, dataclasses.replace(config.data, max_seconds=30.0), True)[refs]

    return reader


@pytest.fixture(autouse=True)
def nothing_is_written_outside(tmp_path: Path) -> Iterator[None]:
    """A payload would make `owned`; a name or a link would write beside the set."""
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"set", "manifest.jsonl"}


def audio(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> list[Member]:
    """Samples float [S] or [S, channels] as a WAV, and the record."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return [member("x.wav", file.getvalue()), JSON]


def three_hours() -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 1_000, 1, format="FLAC", subtype="PCM_16") as out:
        out.write(np.zeros(3 * 3600 * 1_000, dtype=np.int16))
    return file.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


def claims(name: str, size: int, **pax: str) -> Member:
    """A member whose header claims more bytes than follow."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = size, pax
    return info, b"{}"


def payload(suffix: str) -> Callable[[Path], list[Member]]:
    return lambda folder: [*GOOD, member(f"x.{suffix}", pickle.dumps(Payload(folder / "owned")))]


def noisy_header(tar: bytearray) -> bytearray:
    place = tar.index(b"x.json")
    tar[place : place + 512] = random.Random(0).randbytes(512)
    return tar


GOOD = [member("x.flac", FLAC), JSON]
LINK = {"linkname": "/etc/passwd"}
SKIPPED: dict[str, tuple[list[Member] | Callable[[Path], list[Member]], str]] = {
    "audio without its record": (GOOD[:1], r"its \.json member is missing"),
    "record without its audio": (GOOD[1:], "0 audio members"),
    "record twice": ([*GOOD, JSON], "unexpected tar member 'x.json'"),
    "audio of zero bytes": ([member("x.flac"), JSON], "empty file"),
    "audio of zero length": (audio(WAVE[:0]), "holds 0 samples"),
    "audio of one sample": (audio(WAVE[:1]), "holds 1 samples"),
    "audio with NaN": (audio(np.append(WAVE, np.nan), subtype="FLOAT"), "not finite"),
    "audio of 3 hours": (lambda _: [member("x.flac", three_hours()), JSON], "10800.0 s long"),
    "FLAC with a flipped byte": ([member("x.flac", flipped(FLAC, len(FLAC) // 2)), JSON], "damaged"),
    "JSON not UTF-8": ([GOOD[0], member("x.json", record("x") + b"\xff")], "not UTF-8"),
    "JSON nested deeply": ([GOOD[0], member("x.json", b'{"meta":' * 100_000)], "nested too deeply"),
    "JSON that claims 1 GB": ([GOOD[0], claims("x.json", 1 << 30)], "claims 1073741824 bytes"),
    "audio that claims 1 GB": ([claims("x.flac", 1 << 30), JSON], "claims 1073741824 bytes"),
    "sparse audio of 1 GB": ([claims("x.flac", 2, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                                     "GNU.sparse.name": "x.flac",
                                                     "GNU.sparse.realsize": str(1 << 30)}), JSON], "."),
    "header of 1 GB": ([claims("././@PaxHeader", 1 << 30), *GOOD], "claims 1073741824 bytes"),
    "name with ..": ([*GOOD, member("../x.json", record("x"))], r"unexpected tar member '\.\./x\.json'"),
    "absolute name": ([*GOOD, member("/tmp/x.json", record("x"))], "unexpected tar member '/?tmp/x.json'"),
    "symbolic link": ([member("x.flac", kind=tarfile.SYMTYPE, **LINK), JSON], "type b'2'"),
    "hard link": ([member("x.flac", kind=tarfile.LNKTYPE, **LINK), JSON], "type b'1'"),
    "character device": ([member("x.flac", kind=tarfile.CHRTYPE), JSON], "type b'3'"),
    "block device": ([member("x.flac", kind=tarfile.BLKTYPE), JSON], "type b'4'"),
    "pipe": ([member("x.flac", kind=tarfile.FIFOTYPE), JSON], "type b'6'"),
    "pyd with a payload": (payload("pyd"), "unexpected tar member 'x.pyd'"),
    "pickle with a payload": (payload("pickle"), "unexpected tar member 'x.pickle'"),
    "pth with a payload": (payload("pth"), "unexpected tar member 'x.pth'"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_bad_sample_is_skipped_and_named(read: Callable[[Path], Batch], tmp_path: Path, name: str) -> None:
    members, reason = SKIPPED[name]
    folder = write_set(tmp_path / "set", members(tmp_path) if callable(members) else members)
    expect_skipped(read, folder, reason)


def expect_skipped(read: Callable[[Path], Batch], folder: Path, reason: str) -> None:
    tracemalloc.start()
    try:
        batch = read(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch.ids == ["a", "b"], "the neighbours are whole"
    (skipped,) = batch.skipped
    assert (skipped.id, skipped.shard) == ("x", str(folder / "s.tar"))
    with pytest.raises(ShardError, match=reason):
        raise ShardError(skipped.reason)
    assert peak < 48 * 2**20, "a claimed size reserves no memory"


def test_garbage_between_members(read: Callable[[Path], Batch], tmp_path: Path) -> None:
    expect_skipped(read, write_set(tmp_path / "set", GOOD, noisy_header), "garbage after its last tar member")


@pytest.mark.parametrize(("samples", "rate"), [(np.repeat(WAVE[:, None], 8, 1), 16_000), (np.repeat(WAVE, 6), 96_000)],
                         ids=["8 channels", "96 kHz"])
def test_unusual_audio_is_used(read: Callable[[Path], Batch], tmp_path: Path, samples: np.ndarray, rate: int) -> None:
    batch = read(write_set(tmp_path / "set", audio(samples, rate)))
    assert batch.ids == ["a", "x", "b"] and batch.seconds == [0.5] * 3 and not batch.skipped


def cut(folder: Path) -> None:
    """Cut in the middle of a member of `x`, the index made anew over what is left."""
    place = columns_of(folder)["offset"][1] + 700
    (folder / "s.tar").write_bytes((folder / "s.tar").read_bytes()[:place])
    write_index(folder, columns_of(folder))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut mid-member, the index knows": (cut, r"s\.samples\.json: keys 'offset' and 'bytes' reach outside the tar"),
    "cut mid-member": (lambda f: os.truncate(f / "s.tar", 700), r"s\.tar: cut short: 700 bytes, the index says"),
    "zero bytes": (lambda f: os.truncate(f / "s.tar", 0), r"s\.tar: cut short: 0 bytes, the index says"),
    "duplicate ids": (lambda f: write_index(f, columns_of(f) | {"id": ["a", "x", "a"]}), "key 'id': an id comes twice"),
    "index of other bytes": (lambda f: write_index(f, columns_of(f), bytes=99), r"s\.tar: too long: \d+ bytes, the"),
    "index of other counts": (lambda f: write_index(f, columns_of(f), samples=2), "key 'samples': 2 is not the sum"),
    "index of other rows": (lambda f: write_index(f, {**columns_of(f), "id": ["a", "x"]}), "2 rows, the index says 3"),
    "sidecar of another shard": (lambda f: (f / "s.samples.json").write_text("{}"), "sha256 differs from the index"),
    "sidecar of a gigabyte": (lambda f: os.truncate(f / "s.samples.json", 1 << 30), "longer than the 7168 bytes"),
    "a hash that is a path": (lambda f: write_index(f, columns_of(f), sha256="../../x"), "must be 64 hexadecimal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_set_is_refused(read: Callable[[Path], Batch], tmp_path: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    folder = write_set(tmp_path / "set", GOOD)
    assert read(folder).ids == ["a", "x", "b"]
    spoil(folder)
    with pytest.raises(ShardError, match=message):
        read(folder)


def test_shard_that_vanishes_mid_epoch(read: Callable[[Path], Batch], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", GOOD)
    index = ShardIndex.load(folder)
    monkeypatch.setattr(ShardIndex, "load", lambda *_: index)  # a run checks the sizes at its start only
    assert read(folder).ids == ["a", "x", "b"]
    content = (folder / "s.tar").read_bytes()
    (folder / "s.tar").unlink()
    gone = read(folder)
    assert gone.ids == [] and [s.id for s in gone.skipped] == ["a", "x", "b"]
    assert all("s.tar: sample" in s.reason and "can't be opened (No such file" in s.reason for s in gone.skipped)
    (folder / "s.tar").write_bytes(content)
    assert read(folder).ids == ["a", "x", "b"]
