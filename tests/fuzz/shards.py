"""Damaged and hostile shards through the loader, planning, evaluation's reading and `--verify`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from listen_dist.data.loader import BatchReader, decoding_batches, find_filler, training_steps
from listen_dist.data.mixture import Mixture
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.engine.assembly import Parts
from listen_dist.errors import ListenError
from listen_dist.schema import SetConfig
from listen_dist.structures import Batch, LoaderState
from tests import tiny
from tests.fuzz import mutate, world
from tests.fuzz.audio import verify_all
from tests.fuzz.cases import Fault, one_line, poison
from tests.fuzz.sounds import sound

BLOCK = tarfile.BLOCKSIZE
MOST_SAMPLES = 40
"""A hostile index may promise any number; a case reads no more."""


@dataclass(frozen=True)
class World:
    parts: Parts
    good: Path


def prepare(root: Path) -> World:
    world.one_thread()
    parts = world.build(root).listener.parts
    good = root / "good-set"
    if not (good / "index.json").exists():
        shutil.rmtree(good, ignore_errors=True)
        records = [*tiny.speech_records(4), *tiny.sound_records(2)]

        def encode(wave: np.ndarray) -> np.ndarray:
            return parts.model.encoder.encode([parts.log_mel(wave)])[0].numpy().astype(np.float16)

        tiny.write_set(
            good,
            records,
            3,
            encode,
            FeatureInfo(parts.model.encoder.fingerprint, parts.model.encoder.width, 50),
            seconds=[0.3] * len(records),
        )
    return World(parts, good)


def case(here: World, chance: random.Random, folder: Path) -> str:
    path = Path(shutil.copytree(here.good, folder / "set"))
    where = chance.choice(("index", "sidecar", "tar", "tar", "members", "members", "members", "files"))
    {"index": _index, "sidecar": _sidecar, "tar": _tar, "members": _members, "files": _files}[where](chance, path)
    try:
        index = ShardIndex.load(path)
    except ListenError as error:
        one_line(error, str(path))
        return "refused"
    if index.samples > MOST_SAMPLES:
        raise Fault(f"an index of {index.samples} samples passes")
    read = [_one_pass(here, index, stored) for stored in (True, False)]
    _train(here, index, chance)
    _verify(index, changed=_hashes(path) != _hashes(here.good))
    return "skipped" if any(batch.skipped for batches in read for batch in batches) else "used"


def _one_pass(here: World, index: ShardIndex, stored: bool) -> list[Batch]:
    """Evaluation's reading: every sample comes or is skipped by name, and alike when it is read again."""
    reader = _reader(here, index, stored, with_targets=False)
    poison(0x55)
    try:
        batches = list(decoding_batches(reader, here.parts.token_cost(2), 300, 0, 0, 1)[0])
    except ListenError as error:
        one_line(error, str(index.folder))
        return []
    poison(0xAA)
    again = list(decoding_batches(reader, here.parts.token_cost(2), 300, 0, 0, 1)[0])
    poison(0)
    named = sorted(name for batch in batches for name in (*batch.ids, *(sample.id for sample in batch.skipped)))
    if named != sorted(name for shard in range(len(index.shards)) for name in index.shard_table(shard).ids):
        raise Fault("a sample is neither used nor skipped")
    for first, second in zip(batches, again, strict=True):
        check(first)
        if first.ids != second.ids or not torch.equal(first.audio, second.audio):
            raise Fault("read twice, it is not the same")
    return batches


def check(batch: Batch) -> None:
    """Finite, of true lengths, and every skipped sample with its place and reason."""
    if not torch.isfinite(batch.audio).all():
        raise Fault("a batch is not finite")
    if len(batch) and not (0 < batch.audio_lengths.min() and batch.audio_lengths.max() <= max(batch.audio.shape[1:])):
        raise Fault(f"lengths {batch.audio_lengths.tolist()} of a batch {list(batch.audio.shape)}")
    for sample in batch.skipped:
        one_line(ShardError(sample.reason), sample.id, sample.shard)


def _train(here: World, index: ShardIndex, chance: random.Random) -> None:
    """Two steps of training; the plan is the index's, so nothing here may fail beyond a refusal."""
    data = here.parts.config.data
    limits = SetConfig(
        str(index.folder), max_seconds=chance.choice((0.0, 0.0, 0.35)), task=chance.choice(("", "", "asr"))
    )
    reader = _reader(here, index, chance.random() < 0.5, with_targets=True)
    try:
        mixture = Mixture([index], [limits], seed=1, temperature=chance.choice((None, 2.0)))
        steps = training_steps(reader, mixture, here.parts.token_cost(2), data, 1, 2, 0, 1, LoaderState())
        with contextlib.closing(steps):
            for _ in range(2):
                for batch in next(steps)[0]:
                    check(batch)
        find_filler(reader)
    except ListenError as error:
        one_line(error, str(index.folder))


def _verify(index: ShardIndex, changed: bool) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            verify_all(index, 30.0)
    except ListenError as error:
        one_line(error, str(index.folder))
        if not changed:
            raise Fault("--verify refuses a good set") from error


def _reader(here: World, index: ShardIndex, stored: bool, with_targets: bool) -> BatchReader:
    data = replace(here.parts.config.data, stored_features=stored)
    return BatchReader([index], here.parts.log_mel, here.parts.text, data, with_targets)


def _hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- damages --------------------------------------------------------------------------------------------


def _index(chance: random.Random, folder: Path) -> None:
    path = folder / "index.json"
    if chance.random() < 0.3:
        path.write_bytes(mutate.data(chance, path.read_bytes()))
    else:
        path.write_bytes(mutate.to_json(chance, mutate.tree(chance, json.loads(path.read_bytes()))))


def _sidecar(chance: random.Random, folder: Path) -> None:
    path = chance.choice(sorted(folder.glob("*.samples.json")))
    if chance.random() < 0.3:
        path.write_bytes(mutate.data(chance, path.read_bytes()))
    else:
        path.write_bytes(mutate.to_json(chance, mutate.tree(chance, json.loads(path.read_bytes()))))
    if chance.random() < 0.85:
        fit(folder)


def _tar(chance: random.Random, folder: Path) -> None:
    """Bytes of a tar changed, mostly with an index that fits them."""
    path = chance.choice(sorted(folder.glob("*.tar")))
    content = path.read_bytes()
    if chance.random() < 0.5:
        at = BLOCK * chance.randrange(len(content) // BLOCK)
        header = bytearray(content[at : at + BLOCK])
        if chance.random() < 0.6:
            start, end = chance.choice(((0, 100), (100, 108), (124, 136), (156, 157), (257, 265), (345, 500)))
            field = mutate.data(chance, bytes(header[start:end]))[: end - start]
            header[start : start + len(field)] = field
        else:
            header = bytearray(mutate.data(chance, bytes(header))[:BLOCK].ljust(BLOCK, b"\0"))
        if chance.random() < 0.7:  # with the right checksum
            header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
        content = content[:at] + bytes(header) + content[at + BLOCK :]
    else:
        content = mutate.data(chance, content)
    path.write_bytes(content)
    if chance.random() < 0.85:
        fit(folder)


def _members(chance: random.Random, folder: Path) -> None:
    """A tar written again with other members, and an index and a sidecar that fit it."""
    path = chance.choice(sorted(folder.glob("*.tar")))
    sidecar = path.with_name(f"{path.stem}.samples.json")
    table = json.loads(sidecar.read_bytes())
    with tarfile.open(path) as tar:
        samples = [
            [
                (member.name, tar.extractfile(member).read())
                for member in tar.getmembers()  # type: ignore[union-attr]
                if member.name.split(".")[0] == name
            ]
            for name in table["id"]
        ]
    row = chance.randrange(len(samples))
    for _ in range(chance.choice((1, 1, 2))):
        samples[row] = _other_members(chance, samples[row], samples)
    form = chance.choice((tarfile.USTAR_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(path, "w", format=form) as tar:
        for number, members in enumerate(samples):
            table["offset"][number] = tar.offset
            for name, content in members:
                _add(chance, tar, name, content, odd=number == row)
            table["bytes"][number] = max(1, tar.offset - table["offset"][number])
    sidecar.write_text(json.dumps(table), encoding="utf-8")
    fit(folder)


def _add(chance: random.Random, tar: tarfile.TarFile, name: str, content: bytes, odd: bool) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    if odd and chance.random() < 0.1:
        info.pax_headers = {"comment": mutate.text(chance).replace("\ud800", ""), "mtime": "1.5"}
    if odd and chance.random() < 0.05:
        info.type = chance.choice(
            (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.DIRTYPE,
                tarfile.CHRTYPE,
                tarfile.GNUTYPE_SPARSE,
                tarfile.AREGTYPE,
                b"z",
            )
        )
        info.linkname = "/etc/passwd"
    with contextlib.suppress(ValueError):  # a name that this form of tar can't hold
        tar.addfile(info, io.BytesIO(content))


Members = list[tuple[str, bytes]]


def _other_members(chance: random.Random, members: Members, samples: Sequence[Members]) -> Members:
    if not members:
        return members
    at = chance.randrange(len(members))
    name, content = members[at]
    pick = chance.random()
    if pick < 0.1:
        return members[:at] + members[at + 1 :]
    if pick < 0.2:
        return [*members, chance.choice(chance.choice([some for some in samples if some]))]
    if pick < 0.3:
        other = mutate.text(chance).replace("\ud800", "").replace("\0", "")[:90]
        return [
            *members[:at],
            (chance.choice((other, f"{name.split('.')[0]}.{other}", f"./{name}", f"._{name}")), content),
            *members[at + 1 :],
        ]
    return [*members[:at], (name, _other_content(chance, name, content)), *members[at + 1 :]]


def _other_content(chance: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".json") and chance.random() < 0.7:
        with contextlib.suppress(ValueError):  # damaged already
            return mutate.to_json(chance, mutate.tree(chance, json.loads(content)))
    if name.endswith(".flac") and chance.random() < 0.6:
        made = sound(chance).content
        return made if chance.random() < 0.4 else mutate.data(chance, made)
    if name.endswith(".npy") and chance.random() < 0.7:
        return _array(chance)
    return mutate.data(chance, content)


def _array(chance: random.Random) -> bytes:
    """A .npy of an odd shape, type or version, or with a header that says something else."""
    shape = tuple(chance.choice((0, 1, 2, 3, 32, 32, 100)) for _ in range(chance.choice((0, 1, 2, 2, 2, 2, 3))))
    kind = chance.choice(("<f2", "<f2", "<f2", ">f2", "<f4", "<i8", "|O", "|b1", "<U3", "|V4", "<c8"))
    array: Any = (
        np.zeros(shape, kind)
        if kind == "|O" or chance.random() < 0.2
        else np.random.default_rng(chance.getrandbits(32)).uniform(-2, 2, shape).astype(kind)
    )
    if kind in ("<f2", "<f4") and array.size and chance.random() < 0.3:
        array.flat[0] = chance.choice((np.nan, np.inf))
    file = io.BytesIO()
    version = chance.choice(((1, 0), (1, 0), (2, 0), (3, 0)))
    np.lib.format.write_array(file, np.asfortranarray(array) if chance.random() < 0.1 else array, version, kind == "|O")
    content = file.getvalue()
    if chance.random() < 0.5:
        return content
    old, new = chance.choice(
        (
            (b"'shape': (", b"'shape': (10**9, "),
            (b"'shape': ", b"'shape': " + b"(" * 200),
            (b"<f2", b"O"),
            (b"'descr'", b"'desc'"),
            (b"{", b"__import__('os')"),
            (b"(", b"-("),
            (b"}", b""),
        )
    )
    changed = content.replace(old, new, 1)[: len(content)]
    return changed if chance.random() < 0.5 else mutate.data(chance, content)


def _files(chance: random.Random, folder: Path) -> None:
    """A file missing, empty, a folder, a link that leads nowhere, or another's."""
    paths = sorted(folder.iterdir())
    path, other = chance.choice(paths), chance.choice(paths)
    content = other.read_bytes()
    path.unlink()
    what = chance.choice(("gone", "folder", "empty", "link", "loop", "other"))
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to("/nowhere")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what != "gone":
        path.write_bytes(content if what == "other" else b"")


def fit(folder: Path) -> None:
    """Sizes and hashes of the index as those of the files, so that reading goes on to what is in them."""
    index = json.loads((folder / "index.json").read_bytes())
    for entry in index["shards"]:
        tar = (folder / entry["name"]).read_bytes()
        sidecar = (folder / entry["name"].replace(".tar", ".samples.json")).read_bytes()
        entry["bytes"], entry["sha256"] = len(tar), hashlib.sha256(tar).hexdigest()
        entry["samples_sha256"] = hashlib.sha256(sidecar).hexdigest()
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
