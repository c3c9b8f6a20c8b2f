"""tools/shard_dataset.py: manifests to shards, resumable, bad samples skipped and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from listen_dist.data.manifest import write_manifest
from listen_dist.data.shards import ShardIndex
from listen_dist.structures import Record

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from shard_build import BuildOptions, build  # noqa: E402

OPTIONS = BuildOptions(shard_seconds=2.0, max_seconds=5.0, speech_encoder=None, dtype="float32")


def make_manifest(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    records = []
    for number in range(count):
        path = folder / f"{number}.wav"
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, 4_000 + 500 * number)
        soundfile.write(path, noise, 8_000)
        records.append(
            Record(
                id=f"c{number}",
                audio=(str(path),),
                task="asr",
                target=f"t{number}",
                language="en",
                split="train",
            )
        )
    pair = (str(folder / "0.wav"), str(folder / "1.wav"))
    records.append(Record(id="pair", audio=pair, task="speaker_verification", target="yes"))
    write_manifest(folder / "m.jsonl", records)
    return folder / "m.jsonl"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOLS / "shard_dataset.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio")
    (index,) = build({tmp_path / "one": [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert index.samples == 13
    assert len(index.shards) > 3
    assert index.tasks == {"asr": 12, "speaker_verification": 1}
    manifest = manifest.rename(manifest.with_name("asr.train.jsonl"))
    options = ["--separate", "--shard-seconds", 2, "--max-seconds", 5, "--verify", "--stats"]
    result = run_tool(manifest, tmp_path / "two", *options)
    assert result.returncode == 0, result.stderr
    assert "all 13 samples" in result.stdout
    assert tree(tmp_path / "one") == tree(tmp_path / "two/asr/train")
    joined = next(
        index.read_sample(shard, row)
        for shard in range(len(index.shards))
        for row, name in enumerate(index.shard_table(shard).ids)
        if name == "pair"
    )
    assert joined.waveform is not None
    assert (joined.waveform[8_000:9_600] == 0).all()


def test_interrupted_run_keeps_finished_shards(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio")
    out = tmp_path / "out"
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    before = tree(out)
    kept = out / "shard-000001.tar"
    stamp = kept.stat().st_mtime_ns
    (out / "index.json").unlink()
    (out / "shard-000000.tar").write_bytes(before["shard-000000.tar"][:1000])
    (out / "shard-000002.samples.json").unlink()
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert tree(out) == before
    assert kept.stat().st_mtime_ns == stamp, "an intact shard is not written again"


def test_bad_samples_are_skipped_and_named(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio")
    (tmp_path / "audio/3.wav").write_bytes(b"not audio at all")
    (tmp_path / "audio/4.wav").unlink()
    soundfile.write(tmp_path / "audio/5.wav", np.zeros(8_000 * 6), 8_000)
    (index,) = build({tmp_path / "out": [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert (index.samples, index.skipped) == (10, 3)
    rows = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert sorted(reasons) == ["c3", "c4", "c5"]
    assert "can't be decoded" in reasons["c3"]
    assert "no such file" in reasons["c4"]
    assert "the limit is 5 s" in reasons["c5"]


def test_all_bad_is_an_error(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio")
    for path in (tmp_path / "audio").glob("*.wav"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="not one of 13 samples could be used"):
        build({tmp_path / "out": [manifest]}, OPTIONS, workers=1, overwrite=False)


def test_other_input_is_refused_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build({out: [make_manifest(tmp_path / "a")]}, OPTIONS, workers=1, overwrite=False)
    before = tree(out)
    other = make_manifest(tmp_path / "b", count=3)
    with pytest.raises(ValueError, match="holds shards of other manifests or options"):
        build({out: [other]}, OPTIONS, workers=1, overwrite=False)
    assert tree(out) == before
    (index,) = build({out: [other]}, OPTIONS, workers=1, overwrite=True)
    assert index.samples == 4
    assert len(list(out.glob("shard-*.tar"))) == len(index.shards) < 4


def test_features_of_the_speech_encoder_are_stored(tmp_path: Path) -> None:
    encoder = Path(__file__).parents[2] / "assets/models/whisper-tiny.en"
    if not encoder.is_dir():
        pytest.skip("the demo models are not there (tools/get_demo_models.py)")
    manifest = make_manifest(tmp_path / "audio", count=2)
    options = BuildOptions(shard_seconds=60.0, max_seconds=5.0, speech_encoder=str(encoder), dtype="float32")
    (index,) = build({tmp_path / "out": [manifest]}, options, workers=1, overwrite=False)
    assert index.features is not None
    assert (index.features.width, index.features.rate) == (384, 50)
    for row in range(3):
        sample = index.read_sample(0, row, want="both")
        assert sample.features is not None
        assert sample.waveform is not None
        assert abs(len(sample.features) - len(sample.waveform) / 320) <= 1
    ShardIndex.load(tmp_path / "out").verify()


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a"}\n')
    result = run_tool(tmp_path / "m.jsonl", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'm.jsonl'}:1: key 'audio' is missing"
    )
    assert "Traceback" not in result.stderr
