"""One sample's members in a shard: a record, audio, perhaps stored encoder features.

The bytes count as untrusted: only plain files of the names we expect are taken, nothing is unpickled,
and a claimed size is compared with what is there before memory is reserved.
"""

from __future__ import annotations

import io
import logging
import tarfile
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from listen_dist.data.decode import read_audio
from listen_dist.data.manifest import MAX_LINE_BYTES, record_from_json
from listen_dist.errors import ListenError
from listen_dist.structures import AudioSample, Record

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "mp3")
FEATURE_KINDS = ("speech", "audio")
"""Stored frames of the speech encoder and of the audio encoder: <id>.speech.npy, <id>.audio.npy."""

_SUFFIXES = (*AUDIO_SUFFIXES, "json", *(f"{kind}.npy" for kind in FEATURE_KINDS))

logger = logging.getLogger(__name__)

_named: set[str] = set()
"""Kinds of remarks that this process has made."""

Want = Literal["record", "audio", "features", "both"]


class ShardError(ListenError):
    """A shard, sidecar or index that is damaged, missing or hostile; names the file and the cure."""


@dataclass(frozen=True)
class PackedSample:
    """A sample whose audio and features are still bytes."""

    record: Record
    members: dict[str, bytes]
    """Content by suffix."""


def unpack_sample(block: bytes, name: str) -> PackedSample:
    """Take a sample out of the part of a tar that covers its members; `name` is its id.

    Raises:
        ShardError: the tar or the record is not as it should be.
    """
    members = _members(block, name)
    if "json" not in members:
        raise ShardError("its .json member is missing")
    try:
        record = record_from_json(members["json"], need_audio=False)
    except ListenError as error:  # of a question that is missing, say: not only ManifestErrors
        raise ShardError(str(error)) from None
    if record.id != name:
        raise ShardError(f"its .json member is of {record.id!r}")
    return PackedSample(record, members)


def decode_sample(packed: PackedSample, want: Want, max_seconds: float, widths: Mapping[str, int]) -> AudioSample:
    """Decode what is wanted of a sample; `widths` are those of the kinds of features that the set stores.

    Raises:
        ShardError, AudioError: the audio or the features are not as they should be.
    """
    members = packed.members
    waveform, frames = None, {}
    if want in ("audio", "both"):
        audio = [members[suffix] for suffix in AUDIO_SUFFIXES if suffix in members]
        if len(audio) != 1:
            raise ShardError(f"{len(audio)} audio members; expected one")
        sound = read_audio(audio[0], max_seconds)
        waveform = sound.samples
        for remark in sound.remarks:
            # A FLAC was written whole: what is missing was damaged later.
            if "flac" in members and remark.startswith(("shorter", "partly damaged")):
                raise ShardError(f"damaged: {remark}")
            _name_once(remark.partition(":")[0], packed.record.id)
    if want in ("features", "both"):
        if not widths or any(f"{kind}.npy" not in members for kind in widths):
            raise ShardError("no stored features; write the shards with --features")
        frames = {kind: _parse_features(members[f"{kind}.npy"], width) for kind, width in widths.items()}
    return AudioSample(packed.record, waveform, frames.get("speech"), frames.get("audio"))


def _name_once(kind: str, name: str) -> None:
    """Say once in each process what is odd with a sample of a foreign shard; shards of ours were counted when made."""
    if kind not in _named:
        _named.add(kind)
        logger.warning("sample %r is used all the same, %s; further ones aren't named", name, kind)


def _members(block: bytes, name: str) -> dict[str, bytes]:
    """Return suffix -> content of one sample's part of a tar; refuse whatever we don't expect there."""
    allowed = {f"{name}.{suffix}": suffix for suffix in _SUFFIXES}
    found: dict[str, bytes] = {}
    start = 0
    try:
        # Zeros end a tar. We go from header to header ourselves: no link, long name or sparse map is ever followed.
        while block[start : start + 1].strip(b"\0"):
            member, kind, size = _header(block[start : start + tarfile.BLOCKSIZE])
            if size > len(block):
                raise ShardError(f"tar member {member[:100]!r} claims {size} bytes")
            after = start + tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if _is_remark(member, kind, block[start + tarfile.BLOCKSIZE :][:size]):
                start = after
                continue
            suffix = allowed.get(member)
            if suffix is None or suffix in found or kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise ShardError(f"unexpected tar member {member[:100]!r} (type {kind!r})")
            if suffix == "json" and size > MAX_LINE_BYTES:
                raise ShardError(f"tar member {member!r} claims {size} bytes")
            found[suffix] = block[start + tarfile.BLOCKSIZE :][:size]
            if len(found[suffix]) != size:
                raise ShardError(f"tar member {member!r} is cut short")
            start = after
    except tarfile.HeaderError as error:
        raise ShardError(f"garbage after its last tar member ({error}); copy or write the shard anew" if found else
                         f"not a tar at its byte range ({error}); copy or write the shard anew") from None
    if block.count(0, start) != max(0, len(block) - start):
        raise ShardError("garbage after its last tar member; copy or write the shard anew")
    return found


def _is_remark(member: str, kind: bytes, content: bytes) -> bool:
    """Whether a member says something about another one and may be passed over: times (pax), a Mac's attributes.

    Raises:
        ShardError: a pax header that gives the next member another name or size.
    """
    if kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return member.rpartition("/")[2].startswith("._")
    if kind not in (tarfile.XHDTYPE, tarfile.XGLTYPE):
        return False
    keys = {line.partition(b"=")[0].partition(b" ")[2] for line in content.split(b"\n")}
    bound = sorted(key.decode("ascii", "replace") for key in keys if key in (b"path", b"size", b"linkpath")
                   or key.startswith(b"GNU.sparse"))
    if bound:
        raise ShardError(f"a pax header sets {bound[0]!r} of a tar member; write the shard with "
                         "tools/shard_dataset.py, or with plain ustar headers (tar --format=ustar)")
    return True


def _header(header: bytes) -> tuple[str, bytes, int]:
    """Name, type and size of a member, from its 512 bytes. tarfile's own parser takes four times as long.

    Raises:
        tarfile.HeaderError: not a tar header.
    """
    if len(header) != tarfile.BLOCKSIZE:
        raise tarfile.HeaderError("truncated header")
    # The sum counts its own eight bytes as spaces.
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise tarfile.HeaderError("bad checksum")
    name, folder = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    full = folder + b"/" + name if folder else name
    return full.decode("utf-8", "surrogateescape"), header[156:157], _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise tarfile.HeaderError("invalid header")
    try:
        return int(digits, 8)
    except ValueError:
        raise tarfile.HeaderError("invalid header") from None


def _parse_features(content: bytes, width: int) -> np.ndarray:
    """Return float16 [F, E] from the bytes of a .npy file, without numpy.load: nothing to unpickle."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # NumPy tokenizes the header
        raise ShardError(f"stored features are no .npy array: {error}") from None
    data = content[file.tell() :]
    if dtype != np.float16 or fortran or len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise ShardError(f"stored features are {dtype} {shape}; expected float16 [frames, {width}]")
    if len(data) != shape[0] * width * 2:
        raise ShardError(f"stored features hold {len(data)} bytes; {shape} needs {shape[0] * width * 2}")
    frames = np.frombuffer(data, dtype=np.float16).reshape(shape)  # [F, E]
    if not np.isfinite(frames).all():
        raise ShardError("stored features are not finite (NaN or infinity)")
    return frames
