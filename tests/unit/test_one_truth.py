"""A file asked about (Listener) and its sample in a shard (evaluation), with stored frames or without: one answer."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from listen_dist.data.loader import BatchReader
from listen_dist.data.manifest import write_manifest
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.evaluation.decoding import Decoder
from listen_dist.inference.listener import Listener
from listen_dist.schema import SetConfig
from listen_dist.structures import Record
from tests import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from shard_build import BuildOptions, build


@pytest.fixture(scope="module")
def parts(tiny_world: tiny.Tiny) -> Parts:
    """In the default type of the LLM, bfloat16."""
    config = tiny_world.config("model.dtype=bfloat16", "parallel.llm=replicated")
    parts = assemble(config, torch.device("cpu"))
    parts.model.eval()
    return parts


def write_files(folder: Path) -> list[Record]:
    """Quiet, stereo, of other rates and formats: all that rounding and resampling could tell apart."""
    records = []
    for i, (rate, kind, gain) in enumerate([(44_100, "wav", 2e-3), (16_000, "flac", 1.0), (22_050, "mp3", 0.5),
                                            (8_000, "ogg", 1e-2)]):
        wave = np.interp(np.arange(0, 1.3 + i / 5, 1 / rate), np.arange(32_000) / 16_000, tiny.sound(2.0, i)) * gain
        path = folder / f"{i}.{kind}"
        soundfile.write(path, np.stack([wave, wave / 2], 1), rate, subtype="FLOAT" if kind == "wav" else None)
        task, target = ("asr", "the line") if i % 2 else ("emotion", "happy")
        records.append(Record(f"c{i}", (str(path),), task, target))
    return records


def test_a_file_and_its_sample_give_the_same_answer(parts: Parts, tmp_path: Path) -> None:
    records = write_files(tmp_path)
    write_manifest(tmp_path / "m.jsonl", records)
    options = BuildOptions(60.0, 5.0, parts.config.model.speech_encoder)
    (index,) = build({tmp_path / "set": [tmp_path / "m.jsonl"]}, options, workers=1, overwrite=False)
    data = dataclasses.replace(parts.config.data, stored_features=False)
    decoding = dataclasses.replace(parts, config=dataclasses.replace(parts.config, data=data))
    entries = [SetConfig(str(tmp_path / "set"))]
    stored, decoded = parts.reader(entries, with_targets=False), decoding.reader(entries, with_targets=False)
    assert stored.is_features and not decoded.is_features
    listener, decoder = Listener(parts), Decoder(parts, parts.config.eval, parts.config.pool.k, whole=True)
    by_id = {record.id: record for record in records}
    for row, name in enumerate(index.shard_table(0).ids):
        batches = [reader[[SampleRef(0, 0, row)]] for reader in (stored, decoded)]
        frames = [parts.model.frames(batch)[0] for batch in batches]
        assert frames[0].dtype == torch.float16 and torch.equal(*frames), name
        record = by_id[name]
        (heard,) = listener.generate([record.audio[0]], task=record.task)
        for batch in batches:
            with torch.inference_mode():
                answer = decoder.choose(batch) if batch.choices[0] else decoder.generate(batch)
            part = heard.parts[0]
            assert (part.text, part.prompts, part.scores) == (answer[0].text, answer[0].prompts, answer[0].scores)
            assert part.likelihoods == answer[0].likelihoods


def test_frames_do_not_depend_on_the_batch(parts: Parts) -> None:
    data = dataclasses.replace(parts.config.data, stored_features=False)
    reader: BatchReader = dataclasses.replace(parts, config=dataclasses.replace(parts.config, data=data)).reader(
        parts.config.data.train, with_targets=False)
    refs = [SampleRef(0, 0, row) for row in range(4)]
    together, counts = parts.model.frames(reader[refs])
    for i, ref in enumerate(refs):
        assert torch.equal(parts.model.frames(reader[[ref]])[0][0], together[i, : int(counts[i])])


def test_frames_of_an_older_tool_are_named(parts: Parts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = tiny.FeatureInfo(parts.model.encoder.fingerprint, 32, 50, version=1)
    tiny.write_set(tmp_path / "set", tiny.speech_records(2), info=info,
                   encode=lambda wave: np.zeros((len(wave) // 320 + 1, 32), np.float16))
    for _ in range(2):
        parts.reader([SetConfig(str(tmp_path / "set"))], with_targets=False)
    assert [record.message.split(": its stored")[0] for record in caplog.records
            if "made by another version" in record.message] == [str(tmp_path / "set")]
