"""tools/eval_whisper.py on real recordings: Whisper's own decoder, scored and paired with another run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from listen_dist.data.decode import decode_audio
from listen_dist.data.shard_writer import shard_name, write_index, write_shard
from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import Prediction, read_predictions, to_lines
from listen_dist.structures import AudioSample, Record
from tests import tiny
from tests.e2e.test_demo_models import ASSETS, folder_of, whisper_tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare_runs
import eval_whisper

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

CLIPS = ("activated", "agent-loggedoff", "agent-newlocation")


@pytest.fixture(scope="module")
def words(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The program's arguments: a mixed set of three transcriptions and another task's clip."""
    whisper = folder_of(whisper_tiny.NAME)
    manifest = ASSETS / "manifests/asr.train.jsonl"
    if not manifest.is_file():
        pytest.skip(f"{manifest} not made; run make recordings")
    rows = {row["id"].removeprefix("asr-en-"): row for row in map(json.loads, manifest.read_text().splitlines())}
    samples = [AudioSample(Record(name, (), "asr", rows[name]["target"]),
                           decode_audio(manifest.parent / rows[name]["audio"])) for name in CLIPS]
    samples.append(AudioSample(Record("other", (), "language_id", "english"), samples[0].waveform))
    folder = tmp_path_factory.mktemp("real") / "set"
    folder.mkdir()
    write_index(folder, [write_shard(folder / shard_name(0), samples)], skipped=0, features=None)
    return ["--config", str(tiny_world.config_file), f"model.speech_encoder={whisper}",
            f"data.test=[{{path: {folder}}}]"]


def test_it_transcribes_and_is_paired(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "whisper"
    assert eval_whisper.main([*words, "eval.beams=2", "--out", str(out), "--batch", "2"]) == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    entry = results["tasks"]["asr"]
    assert list(results["tasks"]) == ["asr"] and entry["samples"] == 3 and results["skipped"] == 0
    assert entry["metrics"]["wer"] < 0.3 and entry["computed_by"]["wer"].startswith("Whisper's English rules")
    assert len(results["checkpoint_sha256"]) == 64 and results["split"] == "test"
    assert results["decoding"]["beams"] == 2
    rows = read_predictions(out / "predictions.jsonl")
    assert sorted(row.id for row in rows) == sorted(CLIPS)

    other = tmp_path / "listen"
    other.mkdir()
    wrong = [Prediction(row.id, "asr", "nothing of it", row.answers, (1,), (0.5,)) for row in rows]
    more = Prediction("other", "language_id", "english", ("english",), (1,), (0.5,))
    (other / "predictions.jsonl").write_text(to_lines([*wrong, more]))
    (other / "results.json").write_text(json.dumps({"split": "test", "data_fingerprints": {
        **results["data_fingerprints"], "another": "set"}}))
    found = compare_runs.compare_runs(out, other, ["asr"])["asr"]["wer"]
    assert found["first"] == entry["metrics"]["wer"] < found["second"] and found["samples"] == 3
    with pytest.raises(ListenError, match="bytes differ"):
        compare_runs.compare_runs(out, other)
    with pytest.raises(ListenError, match="no prediction of task 'language_id'"):
        compare_runs.compare_runs(out, other, ["language_id"])


def test_what_cannot_be_transcribed_is_refused(words: list[str], tiny_world: tiny.Tiny, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    run = [*words, "--out", str(tmp_path / "out")]
    assert eval_whisper.main([*run, f"data.test=[{{path: {tiny_world.sounds}}}]"]) == 2
    assert "none of its sets holds a sample of the task 'asr'" in capsys.readouterr().err
    assert eval_whisper.main([*run, f"model.speech_encoder={tmp_path}"]) == 2
    assert "this folder holds no model" in capsys.readouterr().err and not (tmp_path / "out").exists()
