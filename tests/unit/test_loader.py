"""The loader: the same batches with and without workers; what cannot be used is named and left out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from listen_dist.data import loader, remote
from listen_dist.data.collate import collate
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader, decoding_batches, find_filler, training_steps
from listen_dist.data.mixture import Mixture, SampleRef
from listen_dist.data.schedule import TokenCost
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.models.encoders import SpeechEncoder, load_speech_encoder
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import ConfigError, DataConfig, SetConfig
from listen_dist.structures import Batch, LoaderState
from tests import tiny

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

COST = TokenCost(fixed=5, audio_tokens_per_second=10.0)


@pytest.fixture(scope="module")
def encoder(tiny_world: tiny.Tiny) -> SpeechEncoder:
    return load_speech_encoder(str(tiny_world.encoder), torch.float32)


@pytest.fixture(scope="module")
def stored(tiny_world: tiny.Tiny, encoder: SpeechEncoder, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The speech set once more, with the tiny encoder's output stored."""
    log_mel = LogMel.from_pretrained(str(tiny_world.encoder))

    def encode(wave: np.ndarray) -> np.ndarray:
        return encoder.encode([log_mel(wave)])[0].numpy().astype(np.float16)

    return tiny.write_set(tmp_path_factory.mktemp("stored") / "set", tiny.speech_records(24), encode=encode,
                          info=FeatureInfo(encoder.fingerprint, encoder.width, 50))


ReaderOf = Callable[..., BatchReader]


@pytest.fixture(scope="module")
def reader_of(tiny_world: tiny.Tiny) -> ReaderOf:
    """A reader over folders of shards, without any LLM."""
    config = tiny_world.config()
    text = TextEncoder(load_tokenizer(config.model.llm), config.model)
    log_mel = LogMel.from_pretrained(config.model.speech_encoder)

    def reader(*folders: Path, with_targets: bool = True, **changes: object) -> BatchReader:
        data = dataclasses.replace(config.data, **changes)  # type: ignore[arg-type]
        return BatchReader([ShardIndex.load(folder) for folder in folders], log_mel, text, data, with_targets)

    return reader


def same(a: Batch, b: Batch) -> bool:
    fields = [field.name for field in dataclasses.fields(Batch)]
    return all(torch.equal(getattr(a, name), getattr(b, name)) if name.startswith("audio")
               else getattr(a, name) == getattr(b, name) for name in fields)


def steps(reader: BatchReader, config: DataConfig, count: int, rank: int = 0, world: int = 1, per_step: int = 2,
          start: LoaderState = LoaderState(),  # noqa: B008
          ) -> list[tuple[list[Batch], LoaderState]]:
    mixture = Mixture(reader.indexes, [SetConfig("set")] * len(reader.indexes), seed=5)
    plan = training_steps(reader, mixture, COST, config, 5, per_step, rank, world, start)
    return list(itertools.islice(plan, count))


def all_refs(index: ShardIndex) -> list[SampleRef]:
    return [SampleRef(0, shard, row) for shard, entry in enumerate(index.shards) for row in range(entry.samples)]


def test_batches_are_right_and_workers_do_not_change_them(tiny_world: tiny.Tiny, reader_of: ReaderOf) -> None:
    reader = reader_of(tiny_world.speech, tiny_world.sounds)
    config = tiny_world.config().data
    alone = steps(reader, config, 6)
    for other in (steps(reader, config, 6), steps(reader, dataclasses.replace(config, workers=2), 6)):
        assert [state for _, state in other] == [state for _, state in alone]
        assert all(same(a, b) for (left, _), (right, _) in zip(alone, other, strict=True)
                   for a, b in zip(left, right, strict=True))
    records = {r.id: r for r in [*tiny.speech_records(24), *tiny.sound_records(12)]}
    batches = [batch for step, _ in alone for batch in step]
    assert max(map(len, batches)) > 1
    for batch in batches:
        assert batch.audio.shape == (len(batch), 80, int(batch.audio_lengths.max())) and not batch.skipped
        for row, name in enumerate(batch.ids):
            record = records[name]
            target = batch.target_ids[row]
            assert target[-1] == reader._text.frame.eos and reader._text.decode(target[:-1]) == record.answers[0]
            assert batch.answers[row] == record.answers and batch.tasks[row] == record.task
            assert not batch.audio[row, :, int(batch.audio_lengths[row]):].any()
        assert [100 * seconds for seconds in batch.seconds] == pytest.approx(batch.audio_lengths.tolist(), abs=1)
        assert batch.target_tokens == sum(map(len, batch.target_ids))


def test_resuming_on_another_number_of_ranks(tiny_world: tiny.Tiny, reader_of: ReaderOf) -> None:
    reader, config = reader_of(tiny_world.speech), tiny_world.config().data
    alone = steps(reader, config, 7)
    for rank in range(2):
        rest = steps(reader, config, 4, rank, 2, start=alone[2][1])
        for (theirs, state), (whole, expected) in zip(rest, alone[3:], strict=True):
            assert state == expected and same(theirs[0], whole[rank])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_decoding_covers_every_sample_once_without_targets(tiny_world: tiny.Tiny, reader_of: ReaderOf,
                                                           world: int) -> None:
    reader = reader_of(tiny_world.test, with_targets=False)
    batches = [batch for rank in range(world) for batch in decoding_batches(reader, COST, 100, 0, rank, world)[0]]
    assert sorted(name for batch in batches for name in batch.ids) == sorted(
        name for shard in range(2) for name in reader.indexes[0].shard_table(shard).ids)
    assert all(batch.target_tokens == 0 and len(batch.target_ids) == len(batch) for batch in batches)


def damage(index: ShardIndex, ref: SampleRef) -> None:
    """Flip bytes in the middle of a sample, after the index was written."""
    table = index.shard_table(ref.shard)
    path = index.folder / index.shards[ref.shard].name
    content = bytearray(path.read_bytes())
    place = int(table.offset[ref.row]) + 512 + 100
    content[place : place + 200] = bytes(byte ^ 0xFF for byte in content[place : place + 200])
    path.write_bytes(content)


def test_a_bad_sample_is_named_and_left_out(tiny_world: tiny.Tiny, reader_of: ReaderOf, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.test, tmp_path / "set")
    reader = reader_of(tmp_path / "set")
    (index,) = reader.indexes
    refs = all_refs(index)
    damage(index, refs[1])
    batch = reader[refs]
    ids = [name for shard in range(2) for name in index.shard_table(shard).ids]
    assert batch.ids == [name for i, name in enumerate(ids) if i != 1]
    (skipped,) = batch.skipped
    assert skipped.id == ids[1] and skipped.shard.endswith("shard-000000.tar") and ids[1] in skipped.reason
    clean = reader[[refs[0], *refs[2:]]]
    assert same(dataclasses.replace(batch, skipped=[]), clean)
    damage(index, refs[0])
    assert find_filler(reader).ids == [ids[2]]
    for ref in refs[2:]:
        damage(index, ref)
    empty = reader[refs]
    assert len(empty) == 0 and len(empty.skipped) == 7 and empty.target_tokens == 0 and empty.seconds == []
    with pytest.raises(ShardError, match=r"none of the first samples of .*set can be used, the last because"):
        find_filler(reader)


def test_a_long_target_and_a_long_clip_are_skipped(tiny_world: tiny.Tiny, reader_of: ReaderOf,
                                                   stored: ShardIndex) -> None:
    for folder in (tiny_world.speech, stored.folder):
        reader = reader_of(folder, max_target_tokens=8, max_seconds=3.0)
        (index,) = reader.indexes
        batch = reader[all_refs(index)]
        reasons = {s.id: s.reason for s in batch.skipped}
        seconds = {index.shard_table(s).ids[r]: index.shard_table(s).seconds[r]
                   for s, entry in enumerate(index.shards) for r in range(entry.samples)}
        assert {name for name, reason in reasons.items() if "max_target_tokens" in reason} and len(batch) > 5
        assert all(seconds[name] <= 3.0 for name in batch.ids)
        assert all(len(ids) <= 8 for ids in batch.target_ids)
        assert {name for name in seconds if seconds[name] > 3.0} <= set(reasons)


def test_no_samples_collate_to_an_empty_batch() -> None:
    for is_features in (False, True):
        assert len(collate([], is_features, [])) == 0


def test_stored_features_equal_the_encoder_run(tiny_world: tiny.Tiny, reader_of: ReaderOf, stored: ShardIndex,
                                               encoder: SpeechEncoder) -> None:
    refs = all_refs(stored)[:5]
    features = reader_of(stored.folder)[refs]
    audio = reader_of(stored.folder, stored_features=False)[refs]
    assert features.is_features and not audio.is_features
    assert features.ids == audio.ids and features.target_ids == audio.target_ids
    frames, lengths = encoder(audio.audio, audio.audio_lengths)
    assert torch.equal(lengths, features.audio_lengths) and features.audio.shape == frames.shape
    torch.testing.assert_close(features.audio.float(), frames, rtol=2e-3, atol=2e-3)  # float16 on disk
    # A set without features among the sets: all are read as audio, since a batch may mix them.
    assert not reader_of(stored.folder, tiny_world.sounds).is_features


def test_features_of_another_encoder_are_refused(tiny_world: tiny.Tiny, stored: ShardIndex, tmp_path: Path) -> None:
    shutil.copytree(stored.folder, tmp_path / "set")
    index = json.loads((tmp_path / "set/index.json").read_text())
    index["features"]["speech"]["fingerprint"] = "0" * 64
    (tmp_path / "set/index.json").write_text(json.dumps(index))
    with_features = assemble(tiny_world.config("parallel.llm=replicated"), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"set: its stored features come from another encoder .*stored_features=fal"):
        with_features.reader([SetConfig(str(tmp_path / "set"))], True)
    assert with_features.reader([SetConfig(str(stored.folder))], True).is_features
    off = tiny_world.config("parallel.llm=replicated", "data.stored_features=false")
    without = Parts(off, with_features.model, with_features.sharding, with_features.text, with_features.log_mel)
    assert not without.reader([SetConfig(str(tmp_path / "set"))], True).is_features


def test_a_loader_process_tells_with_its_batch_what_was_asked_for_again(tiny_world: tiny.Tiny, reader_of: ReaderOf,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(tiny_world.test)
    refs = all_refs(reader.indexes[0])[:1]
    remote.take_retries()
    remote._retried["host"] += 3
    assert reader[refs].retries == {}  # in the trainer itself, which asks for its own
    monkeypatch.setattr(loader, "get_worker_info", lambda: object())
    assert reader[refs].retries == {"host": 3} and reader[refs].retries == {}
