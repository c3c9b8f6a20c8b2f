"""Audio through decoding, the shard tool, and a folder given to `infer`."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np

from listen_dist.data.decode import AudioError, decode_audio, probe_seconds
from listen_dist.data.manifest import write_manifest
from listen_dist.inference import shell
from listen_dist.inference.listener import Ask, Listener
from listen_dist.structures import SAMPLE_RATE, Record
from tests.fuzz import mutate
from tests.fuzz.cases import Fault, one_line, poison
from tests.fuzz.sounds import Sound, sound
from tests.fuzz.world import ROOT, World, build, one_thread

sys.path.insert(0, str(ROOT / "tools"))

import shard_build
from shard_stats import verify_all

LOUDEST = 8.0
"""Of a decoded sample. Float files may go beyond 1 a little, and so does resampling."""
OPTIONS = shard_build.BuildOptions(shard_seconds=20.0, max_seconds=30.0, speech_encoder=None)
LIMITS = (30.0, 30.0, 30.0, 1.0, 0.5, 3600.0)
FORMS = shell.Form(jsonl=True, explain=True, bare=False)


def prepare(root: Path) -> World:
    one_thread()
    return build(root)


def case(world: World, chance: random.Random, folder: Path) -> str:
    if chance.random() < 0.85:
        return one_file(chance, folder)
    files = [write(chance, folder, number) for number in range(chance.randrange(1, 5))]
    (shard_tool if chance.random() < 0.5 else infer_folder)(world, chance, folder, [path for path, _ in files])
    return "folder"


def write(chance: random.Random, folder: Path, number: int = 0) -> tuple[Path, bool]:
    """A sound, mostly damaged, under some name; whether it must be used."""
    made = sound(chance)
    harmed = not (made.plain or chance.random() < 0.2)
    content = mutate.data(chance, made.content) if harmed else made.content
    return path_for(chance, folder, number, made, content), made.plain


def path_for(chance: random.Random, folder: Path, number: int, made: Sound, content: bytes) -> Path:
    wrong = chance.choice(("", ".wav", ".mp3", ".g722", ".txt", ".WAV", ".flac"))
    suffix = f".{made.suffix}" if chance.random() < 0.8 or made.plain else wrong
    stem = chance.choice(("a", "a", "é ü", "a\tb", "日本", "x" * 150, "-a", "{a,b}", "a'b", "a#b?c", ".a"))
    path = folder / f"{stem}{number}{suffix}"
    path.write_bytes(content)
    return path


def one_file(chance: random.Random, folder: Path) -> str:
    """Decode a file twice by its path and once from its bytes, in memory of different content."""
    path, usable = write(chance, folder)
    limit = 30.0 if usable else chance.choice(LIMITS)
    poison(0x55)
    first = _decoded(path, limit)
    poison(0xAA)
    second = _decoded(path, limit)
    _same(first, second, "decoded twice")
    poison(0)
    # Without its suffix, which may tell the format. Another library may decode it then: MP3 to within 1e-6.
    bare = Path(shutil.copy(path, folder / "bare"))
    _same(_decoded(bare, limit), _decoded(bare.read_bytes(), limit), "decoded by path and from its bytes", 1e-4)
    seconds = probe_seconds(path)
    if seconds is not None and not 0 <= seconds < 1e19:
        raise Fault(f"probe_seconds gives {seconds}")
    if isinstance(first, str):
        if usable:
            raise Fault(f"a usual {path.suffix} file is refused: {first[len(str(path)) :]}")
        return "refused"
    return "used"


def _decoded(source: Path | bytes, limit: float) -> np.ndarray | str:
    """The samples, checked, or the message of a refusal, without the name."""
    try:
        samples = decode_audio(source, limit)
    except AudioError as error:
        one_line(error, *([] if isinstance(source, bytes) else [source.name]))
        return str(error) if isinstance(source, bytes) else str(error).removeprefix(f"{source}: ")
    check(samples, limit)
    return samples


def check(samples: np.ndarray, limit: float) -> None:
    if samples.dtype != np.float32 or samples.ndim != 1 or not len(samples):
        raise Fault(f"samples {samples.dtype} {samples.shape}")
    if not np.isfinite(samples).all():
        raise Fault("samples that are not finite are passed on")
    if np.abs(samples).max() > LOUDEST:
        raise Fault(f"samples beyond {LOUDEST:g} are passed on")
    if len(samples) > limit * SAMPLE_RATE + 1:
        raise Fault("longer than the limit")


def _same(first: np.ndarray | str, second: np.ndarray | str, how: str, tolerance: float = 0.0) -> None:
    if isinstance(first, str) and isinstance(second, str):  # FFmpeg's words for damage differ with the way of reading
        return
    if (
        isinstance(first, str)
        or isinstance(second, str)
        or first.shape != second.shape
        or not np.allclose(first, second, rtol=0, atol=tolerance)
    ):
        told = [found if isinstance(found, str) else f"{len(found)} samples" for found in (first, second)]
        raise Fault(f"{how}, it is not the same\n{told[0]}\n{told[1]}")


def shard_tool(_: World, chance: random.Random, folder: Path, files: list[Path]) -> None:
    """Good and bad files in one manifest: the good one is in the shard, each other is there or named as skipped."""
    good = folder / "good.wav"
    good.write_bytes(_GOOD)
    records = [Record(f"s{number}", (str(path),), "asr", "hello") for number, path in enumerate([good, *files])]
    if chance.random() < 0.5:
        records.append(Record("pair", (str(good), str(files[0])), "speaker_verification", "yes"))
    write_manifest(folder / "m.jsonl", records)
    with contextlib.redirect_stdout(io.StringIO()):
        (index,) = shard_build.build({folder / "out": [folder / "m.jsonl"]}, OPTIONS, workers=1, overwrite=False)
        verify_all(index, OPTIONS.max_seconds)
    skipped = [
        json.loads(line) for line in (folder / "out/skipped.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    names = [name for shard in range(len(index.shards)) for name in index.shard_table(shard).ids]
    if sorted([*names, *(sample["id"] for sample in skipped)]) != sorted(record.id for record in records):
        raise Fault("a sample is neither in a shard nor skipped")
    if "s0" not in names or not all(sample["reason"].strip() for sample in skipped):
        raise Fault("the good file is skipped, or a skipped one without a reason")
    for shard in range(len(index.shards)):
        for row in range(len(index.shard_table(shard))):
            waveform = index.read_sample(shard, row).waveform
            assert waveform is not None
            check(waveform, OPTIONS.max_seconds)


def infer_folder(world: World, chance: random.Random, folder: Path, files: list[Path]) -> None:
    """Every file that counts as audio has one line, an answer or an error."""
    (folder / "good.wav").write_bytes(_GOOD)
    listener: Listener = world.listener
    asked = [str(folder)] if chance.random() < 0.5 else [str(path) for path in (*files, folder / "good.wav")]
    names, clips = shell.inputs(asked, False)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        shell.write(names, listener.listen(clips, Ask(max_new_tokens=3)), FORMS)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    if [row["file"] for row in rows] != names:
        raise Fault("not one line for each file, in order")
    for row in rows:
        if ("text" in row) == ("error" in row):
            raise Fault("a line with neither text nor error")
    if not any(row["file"].endswith("good.wav") and "text" in row for row in rows):
        raise Fault("the good file has no answer")


def _good() -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.3, 0.3, 8000), 16000, format="WAV")
    return file.getvalue()


_GOOD = _good()
