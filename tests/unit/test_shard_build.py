"""tools/shard_dataset.py: manifests to shards, resumable, bad samples skipped and named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock

from listen_dist.data import shard_writer
from listen_dist.data.decode import Sound, UnreachableAudio, read_audio
from listen_dist.data.manifest import write_manifest
from listen_dist.data.shard_writer import encode_features, write_index, write_shard
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.errors import ListenError
from listen_dist.structures import AudioSample, Record
from tests import launching

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import shard_build  # noqa: E402
from shard_build import BuildOptions, build  # noqa: E402
from shard_stats import plot, print_stats, verify_all  # noqa: E402

OPTIONS = BuildOptions(shard_seconds=2.0, max_seconds=5.0, speech_encoder=None)


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


STALLS = """
import pathlib, sys, time
tools, mark, clips = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1))
sys.path.insert(0, tools)
import shard_build, shard_dataset
decode, asked = shard_build._decode, []
def stalling(*arguments):
    asked.append(arguments)
    if len(asked) > clips:
        mark.touch()
        time.sleep(3600)
    return decode(*arguments)
shard_build._decode = stalling
shard_dataset.main()
"""
"""The tool, over a disk that never gives more than the first so many clips: it can be killed in mid-shard for sure."""


def test_killed_run_goes_on(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio", count=24)
    out, log, mark = tmp_path / "out", tmp_path / "log", tmp_path / "stalled"
    words = [sys.executable, "-c", STALLS, TOOLS, mark, 10, manifest, out, "--shard-seconds", 2, "--max-seconds", 5]
    process = launching.start([*words, "--workers", 1], log)
    try:
        wait_for(lambda: mark.exists() or process.poll() is not None)
    finally:
        launching.kill_tree(process)
    assert mark.exists(), log.read_text()
    done = [out / path.name.removesuffix(".json") for path in out.glob(".build/shard-*.json")]
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert 3 <= len(done) <= 10 and list(out.glob(".shard-*.tar.*")), "finished shards, and half of one"
    assert not (out / "index.json").exists()
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    build({tmp_path / "whole": [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert tree(out) == tree(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == stamps[path] for path in done), "finished shards are not written again"


def wait_for(ready: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    manifest, out = make_manifest(tmp_path / "audio", count=2), tmp_path / "out"
    (out / ".build").mkdir(parents=True)
    with FileLock(out / ".build/lock"), pytest.raises(ListenError, match="out: another process is writing shards here"):
        build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)


def test_shards_of_a_size_in_bytes(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "audio", count=80)
    options = dataclasses.replace(OPTIONS, shard_seconds=0.0, shard_bytes=400_000, max_seconds=6.0)
    (index,) = build({tmp_path / "out": [manifest]}, options, workers=1, overwrite=False)
    sizes = [shard.bytes for shard in index.shards]
    assert len(sizes) > 4 and index.samples == 81
    # A shard ends before the clip that would pass the size; the longest takes 5.5 s of some 16.
    assert all(0.65 * 400_000 < size < 1.05 * 400_000 for size in sizes[:-1]), sizes


def test_stats_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (index,) = build({tmp_path / "out": [make_manifest(tmp_path / "audio")]}, OPTIONS, workers=1, overwrite=False)
    print_stats(index)
    plot(index, tmp_path / "set.png")
    printed = capsys.readouterr().out
    assert "13 samples" in printed and "speaker_verification" in printed and "languages: none 1, en 12" in printed
    assert (tmp_path / "set.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_verify_compares_samples_with_their_sidecar(tmp_path: Path) -> None:
    (index,) = build({tmp_path / "out": [make_manifest(tmp_path / "audio")]}, OPTIONS, workers=1, overwrite=False)
    verify_all(index, 5.0)
    changes = {"seconds": [9.0, "sidecar says asr, 9.0000 s"], "task": ["qa", "sidecar says qa"]}
    for key, (value, message) in changes.items():
        table = index.shard_table(0)
        column = {"seconds": table.seconds, "task": table.tasks}[key].copy()
        column[0] = value
        wrong = dataclasses.replace(table, **{"tasks" if key == "task" else key: column})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ListenError, match=message):
            patch.setattr(type(index), "shard_table", lambda self, shard, wrong=wrong: wrong)
            verify_all(index, 5.0)
    twice = f"{{{tmp_path}/out,{tmp_path}/copy}}"
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    with pytest.raises(ListenError, match=r"copy/shard-000000\.tar: id .* stands in .*out/shard-000000\.tar too"):
        verify_all(ShardIndex.load(twice), 5.0)


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
    with pytest.raises(ListenError, match="not one of 13 samples could be used"):
        build({tmp_path / "out": [manifest]}, OPTIONS, workers=1, overwrite=False)


def test_other_input_is_refused_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build({out: [make_manifest(tmp_path / "a")]}, OPTIONS, workers=1, overwrite=False)
    before = tree(out)
    other = make_manifest(tmp_path / "b", count=3)
    with pytest.raises(ListenError, match="of other input: the manifests changed .13 records then, 4 now."):
        build({out: [other]}, OPTIONS, workers=1, overwrite=False)
    assert tree(out) == before
    (index,) = build({out: [other]}, OPTIONS, workers=1, overwrite=True)
    assert index.samples == 4
    assert len(list(out.glob("shard-*.tar"))) == len(index.shards) < 4


def test_a_clip_out_of_reach_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = make_manifest(tmp_path / "audio"), tmp_path / "out"
    (tmp_path / "audio/4.wav").rename(tmp_path / "4.wav")
    refused: list[object] = []

    def refuse_once(path: str, max_seconds: float) -> Sound:
        if path.endswith("/7.wav") and not refused:
            refused.append(path)
            raise UnreachableAudio(f"{path}: can't be read: Input/output error")
        return read_audio(path, max_seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_build, "read_audio", refuse_once)
        (index,) = build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert (index.samples, index.skipped) == (11, 2)
    assert "2 files were out of reach, for instance" in capsys.readouterr().err
    (tmp_path / "4.wav").rename(tmp_path / "audio/4.wav")
    (index,) = build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert (index.samples, index.skipped) == (13, 0)
    assert "out of reach" not in capsys.readouterr().err
    assert sorted(name for shard in range(len(index.shards)) for name in index.shard_table(shard).ids) == sorted(
        [*(f"c{n}" for n in range(12)), "pair"])
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-*")} == stamps, "all are kept"


def test_only_what_files_hold_matters(tmp_path: Path) -> None:
    manifest, out = make_manifest(tmp_path / "audio"), tmp_path / "out"
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    os.utime(tmp_path / "audio/3.wav")
    shutil.move(tmp_path / "audio", tmp_path / "moved")
    text = (tmp_path / "moved/m.jsonl").read_text().replace(str(tmp_path / "audio"), str(tmp_path / "moved"))
    (tmp_path / "moved/m.jsonl").write_text(text)
    build({out: [tmp_path / "moved/m.jsonl"]}, OPTIONS, workers=1, overwrite=False)
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-*")} == stamps, "all are kept"
    soundfile.write(tmp_path / "moved/3.wav", np.zeros(5_500), 8_000)
    with pytest.raises(ListenError, match=r"moved/3\.wav held something else then; .* or --overwrite"):
        build({out: [tmp_path / "moved/m.jsonl"]}, OPTIONS, workers=1, overwrite=False)
    shorter = dataclasses.replace(OPTIONS, max_seconds=4.0)
    with pytest.raises(ListenError, match=r"of other input: max_seconds was 5\.0, is 4\.0; give another"):
        build({out: [tmp_path / "moved/m.jsonl"]}, shorter, workers=1, overwrite=False)
    build({out: [tmp_path / "moved/m.jsonl"]}, OPTIONS, workers=1, overwrite=True)
    changed = {path for path in out.glob("shard-*.tar") if path.stat().st_mtime_ns != stamps[path]}
    assert len(changed) == 1, "only the shard of the file that changed is written again"


def test_what_is_used_though_something_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = make_manifest(tmp_path / "audio"), tmp_path / "out"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 8_000)
    soundfile.write(tmp_path / "audio/2.wav", np.stack([noise, -noise], 1), 8_000)
    soundfile.write(tmp_path / "audio/5.wav", np.zeros(8_000), 8_000)
    file = tmp_path / "audio/6.wav"
    file.write_bytes(file.read_bytes()[:9_000])
    (index,) = build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert (index.samples, index.skipped) == (13, 0)
    printed = capsys.readouterr().out
    for kind, name in (("channels cancel each other", 2), ("digital silence", 5), ("shorter than its header says", 6)):
        assert f"used all the same, {kind}: 1 times, for instance c{name}\n" in printed
    rows = [json.loads(line) for line in (out / "remarks.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["c2", "c5", "c6"]
    before = tree(out)
    (out / "index.json").unlink()
    build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    assert tree(out) == before, "kept shards keep their remarks"
    verify_all(index, 5.0)
    assert "1 of them are digital silence, for instance c5" in capsys.readouterr().out


def test_frames_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    class Broken:
        def encode(self, inputs: list[np.ndarray]) -> list[torch.Tensor]:
            return [torch.full((len(inputs[0]) // 320, 4), torch.nan if len(inputs[0]) > 15_000 else 1.0)]

    manifest, out = make_manifest(tmp_path / "audio"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_build, "_encoders", lambda *_: [(Broken(), lambda wave: wave)])
        patch.setattr(shard_build, "_feature_infos", lambda _: [FeatureInfo("0" * 64, 4, 50)])
        (index,) = build({out: [manifest]}, OPTIONS, workers=1, overwrite=False)
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert index.skipped == len(rows) > 0 and all("frames of Broken aren't finite" in row["reason"] for row in rows)
    sample = AudioSample(Record("odd", (), "asr", "x"), np.zeros(800, np.float32), np.full((2, 4), np.inf, np.float16))
    with pytest.raises(ListenError, match="sample 'odd': its speech frames aren't finite"):
        write_shard(tmp_path / "shard.tar", [sample])
    assert not list(tmp_path.glob("shard.tar*"))


def test_verify_finds_frames_of_older_shards_that_are_not_finite(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "old"
    out.mkdir()
    frames = np.zeros((2, 4), np.float16)
    samples = [AudioSample(Record(f"c{n}", (), "asr", "x"), np.full(800, n / 10, np.float32), frames) for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:  # as an older version wrote them
        patch.setattr(shard_writer, "encode_features", lambda frames: encode_features(np.full_like(frames, np.nan)))
        shard = write_shard(out / "shard-000000.tar", samples)
    assert shard is not None
    write_index(out, [shard], 0, FeatureInfo("0" * 64, 4, 50))
    tree = json.loads((out / "index.json").read_text())
    del tree["features"]["speech"]["version"]
    (out / "index.json").write_text(json.dumps(tree))
    index = ShardIndex.load(out)
    assert index.features is not None and index.features.version == 1
    with pytest.raises(ListenError, match=r"'c0': stored features are not finite .*\(3 of 3 samples are wrong\)"):
        verify_all(index, 5.0)
    assert capsys.readouterr().err.count("stored features are not finite") == 3


def test_features_of_the_speech_encoder_are_stored(tmp_path: Path) -> None:
    encoder = Path(__file__).parents[2] / "assets/models/whisper-tiny.en"
    if not encoder.is_dir():
        pytest.skip("the demo models are not there (tools/get_demo_models.py)")
    manifest = make_manifest(tmp_path / "audio", count=2)
    options = BuildOptions(shard_seconds=60.0, max_seconds=5.0, speech_encoder=str(encoder))
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
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'm.jsonl'}:1: key 'audio' is missing"
    )
    assert "Traceback" not in result.stderr
