"""Dev evaluations that can't be scored: warned of, while training goes on; ids that come twice are named before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from listen_dist.engine.assembly import assemble
from listen_dist.evaluation.decoding import Decoder, UnscorableError, check_ids
from listen_dist.evaluation.dev import evaluate_dev
from listen_dist.schema import ConfigError
from listen_dist.structures import Record
from tests import tiny

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


def test_what_cant_be_scored_is_warned_of(tiny_world: tiny.Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    noise = [Record(f"noise-{i}", (), "asr", "[noise]", language="en") for i in range(2)]
    tiny.write_set(tmp_path / "dev", [*noise, *tiny.sound_records(2)])
    parts = assemble(tiny_world.config("parallel.llm=replicated", f"data.dev=[{{path: {tmp_path / 'dev'}}}]"),
                     torch.device("cpu"))
    assert set(evaluate_dev(parts)) == {"speech_qa"}  # one caption alone has no CIDEr-D either
    assert "data.dev: wer of asr is not computed, because no reference has a word left" in caplog.text
    assert "data.dev: cider_d of caption is not computed, because it needs two samples" in caplog.text

    def refuse(*_: object) -> None:
        raise UnscorableError("dev: 1 results for 2 samples")

    monkeypatch.setattr(Decoder, "decode_set", refuse)
    assert evaluate_dev(parts) == {} and parts.model.trainable.training
    assert "a set of data.dev is left out: dev: 1 results for 2 samples" in caplog.text
    assert "no sample could be used" in caplog.text


def test_what_cant_be_read_is_counted_and_named(tiny_world: tiny.Tiny, tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_set(tmp_path / "dev", tiny.speech_records(4))
    (shard,) = (tmp_path / "dev").glob("*.tar")
    content = shard.read_bytes()
    assert content.count(b"fLaC") == 4
    shard.write_bytes(content.replace(b"fLaC", b"none", 1))
    parts = assemble(tiny_world.config("parallel.llm=replicated", f"data.dev=[{{path: {tmp_path / 'dev'}}}]"),
                     torch.device("cpu"))
    assert set(evaluate_dev(parts)) == {"asr", "language_id"}
    (said,) = [line.getMessage() for line in caplog.records if "skipped" in line.getMessage()]
    assert re.match(rf"data\.dev: 1 samples skipped: speech-0\d: {re.escape(str(shard))}: \S", said), said


def test_ids_that_folders_share_are_named(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.write_set(tmp_path / name, tiny.speech_records(6))
    joined = f"data.dev=[{{path: '{tmp_path}/{{a,b}}'}}]"
    with pytest.raises(ConfigError, match=r"data\.dev: the id 'speech-00' stands in .*shard-000000\.tar and in .*set "
                                          "of its own instead of joining them by braces"):
        check_ids("dev", tiny_world.config(joined))
    apart = f"data.dev=[{{path: {tmp_path / 'a'}}}, {{path: {tmp_path / 'b'}}}]"
    check_ids("dev", tiny_world.config(apart))
