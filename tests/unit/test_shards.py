"""Shards: written bytes are reproducible and plain WebDataset; whatever is broken or hostile is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset

from listen_dist.data.decode import decode_audio
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shard_writer import write_index, write_shard
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.structures import AudioSample, Record

WIDTH = 8
FEATURES = FeatureInfo("f" * 64, WIDTH, 50)


def make_sample(number: int, seconds: float = 0.5) -> AudioSample:
    generator = np.random.default_rng(number)
    size = round(seconds * 16_000)
    ints = generator.integers(-9000, 9000, size)
    record = Record(
        id=f"clip-{number}",
        audio=("/gone.wav",),
        task="asr",
        target=f"text {number}",
        language="en",
        duration=seconds,
    )
    frames = generator.standard_normal((-(-size // 320), WIDTH)).astype(np.float16)
    return AudioSample(record, (ints / 32768).astype(np.float32), frames)


def write_set(folder: Path, count: int = 4) -> ShardIndex:
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(2):
        samples = [make_sample(number * count + row, 0.3 + 0.1 * row) for row in range(count)]
        shards.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
    write_index(folder, [shard for shard in shards if shard], skipped=1, features=FEATURES)
    return ShardIndex.load(folder)


def same_bytes(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


# --- what is written is read -------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set")
    assert (index.samples, len(index.shards), index.skipped) == (8, 2, 1)
    assert index.tasks == {"asr": 8}
    assert index.languages == {"en": 8}
    assert index.features == FEATURES
    for shard in range(2):
        table = index.shard_table(shard)
        assert len(table) == 4
        for row in range(4):
            expected = make_sample(shard * 4 + row, 0.3 + 0.1 * row)
            sample = index.read_sample(shard, row, want="both")
            assert sample.record == dataclasses.replace(expected.record, audio=())
            assert np.array_equal(sample.waveform, expected.waveform)
            assert np.array_equal(sample.features, expected.features)
            assert table.seconds[row] == len(expected.waveform) / 16_000
            assert table.text_chars[row] == len(expected.record.target) + len("Transcribe.")
    assert index.seconds == pytest.approx(2 * sum(0.3 + 0.1 * row for row in range(4)))
    index.verify()


def test_features_alone_leave_the_audio_undecoded(tmp_path: Path) -> None:
    sample = write_set(tmp_path / "set").read_sample(1, 2, want="features")
    assert sample.waveform is None
    assert sample.features is not None
    assert sample.features.dtype == np.float16


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert a.fingerprint == b.fingerprint
    assert write_set(tmp_path / "c", count=3).fingerprint != a.fingerprint


def test_index_is_small_to_pickle_and_holds_no_open_file(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set")
    copy = pickle.loads(pickle.dumps(index))
    assert copy == index
    assert np.array_equal(copy.read_sample(0, 0).waveform, index.read_sample(0, 0).waveform)


def expect_sample(number: int, name: str, flac: bytes, record: bytes | dict[str, Any], features: np.ndarray) -> None:
    """What another library read is sample `number` of `write_set`."""
    expected = make_sample(number, 0.3 + 0.1 * (number % 4))
    fields = record if isinstance(record, dict) else json.loads(record)
    assert name == expected.record.id
    assert {key: fields[key] for key in ("id", "task", "target", "language", "duration")} == {
        "id": name, "task": "asr", "target": f"text {number}", "language": "en", "duration": expected.record.duration}
    assert np.array_equal(decode_audio(flac), expected.waveform)
    assert np.array_equal(features, expected.features)


def test_shards_open_in_plain_webdataset(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    urls = [str(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 8
    for number, sample in enumerate(samples):
        features = np.load(io.BytesIO(sample["speech.npy"]), allow_pickle=False)
        expect_sample(number, sample["__key__"], sample["flac"], sample["json"], features)


def test_shards_open_in_hugging_face_datasets(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    files = {"train": str(tmp_path / "set/shard-*.tar")}
    text = datasets.Value("string")
    columns = datasets.Features({
        "__key__": text, "__url__": text, "flac": datasets.Value("binary"),  # its own decoder needs FFmpeg
        "json": {"id": text, "task": text, "target": text, "language": text, "duration": datasets.Value("float64")},
        "speech.npy": datasets.List(datasets.List(datasets.Value("float16")))})
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", features=columns,
                                 cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 8
    for number, row in enumerate(rows):
        features = np.array(row["speech.npy"], dtype=np.float16)
        expect_sample(number, row["__key__"], row["flac"], row["json"], features)


def test_tar_alone_reads_them(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with tarfile.open(tmp_path / "set/shard-000000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["clip-0.flac", "clip-0.json", "clip-0.speech.npy"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_no_samples_leave_no_file(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "shard-000000.tar", []) is None
    assert list(tmp_path.iterdir()) == []


# --- an index that disagrees with what is there ------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "index.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


BREAKAGES = {
    "cut shard": (
        lambda f: shorten(f / "shard-000001.tar"),
        r"shard-000001\.tar: cut short: \d+ bytes, the index",
    ),
    "longer shard": (
        lambda f: (f / "shard-000001.tar").open("ab").write(b"x" * 9),
        r"shard-000001\.tar: too long",
    ),
    "empty shard": (
        lambda f: (f / "shard-000000.tar").write_bytes(b""),
        r"shard-000000\.tar: cut short: 0 bytes",
    ),
    "missing shard": (lambda f: (f / "shard-000000.tar").unlink(), r"shard-000000\.tar: missing"),
    "missing sidecar": (
        lambda f: (f / "shard-000000.samples.json").unlink(),
        r"000000\.samples\.json: missing",
    ),
    "no index": (lambda f: (f / "index.json").unlink(), "no such index"),
    "index not JSON": (lambda f: (f / "index.json").write_text("{"), r"index\.json: not JSON"),
    "index not UTF-8": (lambda f: (f / "index.json").write_bytes(b"\xff{}"), r"index\.json: not JSON"),
    "index a bomb": (lambda f: (f / "index.json").write_text("[" * 200_000), r"index\.json: not JSON"),
    "index a list": (lambda f: (f / "index.json").write_text("[]"), "key 'format_version' is missing"),
    "newer format": (
        lambda f: edit_index(f, lambda d: d.update(format_version=9)),
        "'format_version': 9, this code",
    ),
    "no shards": (lambda f: edit_index(f, lambda d: d.update(shards=[])), "key 'shards' is empty"),
    "wrong sum": (lambda f: edit_index(f, lambda d: d.update(samples=99)), "are not the sums"),
    "count as text": (
        lambda f: edit_index(f, lambda d: d.update(samples="8")),
        "key 'samples': expected int",
    ),
    "infinite": (
        lambda f: edit_index(f, lambda d: d.update(seconds=float("inf"))),
        "key 'seconds': expected float",
    ),
    "huge": (
        lambda f: edit_index(f, lambda d: d["shards"][0].update(bytes=10**30)),
        "key 'bytes': expected int",
    ),
    "name twice": (
        lambda f: edit_index(f, lambda d: d.update(shards=[d["shards"][0]] * 2)),
        "a name comes twice",
    ),
    "features not an object": (
        lambda f: edit_index(f, lambda d: d.update(features=[1])),
        "'speech' is missing",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_set_is_refused_at_load(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    breakage, message = BREAKAGES[name]
    breakage(tmp_path / "set")
    with pytest.raises(ShardError, match=message):
        ShardIndex.load(tmp_path / "set")


@pytest.mark.parametrize(
    "name",
    ["../shard-000000.tar", "/etc/passwd", "a/b.tar", "..tar", "pipe:touch owned.tar", "shard.zip", ""],
)
def test_unsafe_names_in_an_index_are_refused(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    edit_index(tmp_path / "set", lambda data: data["shards"][0].update(name=name))
    with pytest.raises(ShardError, match="key 'name': .* is not a plain name"):
        ShardIndex.load(tmp_path / "set")


def test_flipped_byte_is_found_by_verify(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set")
    path = tmp_path / "set/shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-000001\.tar: sha256 differs"):
        ShardIndex.load(tmp_path / "set").verify()
    assert index.read_sample(0, 0).record.id == "clip-0"


def test_changed_sidecar_is_refused_when_read(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set")
    path = tmp_path / "set/shard-000000.samples.json"
    path.write_text(path.read_text().replace("clip-0", "clip-9"))
    with pytest.raises(ShardError, match="sha256 differs from the index"):
        index.shard_table(0)


def test_shard_that_vanishes_is_a_clear_error(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set")
    (tmp_path / "set/shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar: sample 'clip-1': the shard can't be opened"):
        index.read_sample(0, 1)
