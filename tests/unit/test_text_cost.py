"""What a set's texts cost in tokens: learned from its first shard, the same on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listen_dist.data.mixture import SampleRef
from listen_dist.data.schedule import TextTokens, TokenCost, costs_of
from listen_dist.data.shard_members import ShardError
from listen_dist.data.text import TextEncoder
from listen_dist.data.text_cost import fit_line, learn_text_tokens
from listen_dist.models.llm import load_tokenizer
from listen_dist.structures import Record
from tests import tiny

pytestmark = pytest.mark.timeout(120)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 200)), min_size=2, max_size=60))
def test_the_line_is_numpys_unless_it_falls(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=float).T
    line = fit_line(points)
    slope, base = np.polyfit(x - x.mean(), y, 1) if x.std() else (0.0, y.mean())
    assert line.per_character == pytest.approx(max(0.0, slope), abs=1e-7)
    assert line.base + line.per_character * x.mean() == pytest.approx(y.mean(), abs=1e-7)


def test_no_text_leaves_the_rule_of_thumb() -> None:
    assert fit_line([]) == TextTokens()


def test_costs_of_a_set_are_right_in_sum_and_bad_samples_do_not_count(
        tiny_world: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_world.config()
    text = TextEncoder(load_tokenizer(config.model.llm), config.model)
    sets = [tiny.speech_records(12), tiny.sound_records(9)]
    indexes = [tiny.write_set(tmp_path / str(number), records, per_shard=12) for number, records in enumerate(sets)]
    cost = TokenCost(7, 10.0, tuple(learn_text_tokens(index, text) for index in indexes))
    for number, (index, records) in enumerate(zip(indexes, sets, strict=True)):
        planned = costs_of([SampleRef(number, 0, row) for row in range(len(records))], indexes, cost)
        audio = np.ceil(index.shard_table(0).seconds * 10).sum()
        texts = sum(len(text.after_ids(record)) - text.fixed_after + len(text.target_ids(record.answers[0])) - 1
                    for record in records)
        assert planned.sum() == pytest.approx(7 * len(records) + audio + texts)

    def unreadable(*_: object) -> None:
        raise ShardError("damaged")

    monkeypatch.setattr(type(indexes[0]), "read_sample", unreadable)
    assert learn_text_tokens(indexes[0], text) == TextTokens()


def test_of_a_clip_in_which_nothing_is_said_eos_alone_is_learned(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    index = tiny.write_set(tmp_path / "set", [Record("silence", (), "asr", meta={"no_speech": True})])
    record = index.read_sample(0, 0, "record", 30.0).record
    text = TextEncoder(load_tokenizer(tiny_world.config().model.llm), tiny_world.config().model)
    assert text.target_ids(record.answers[0]) == [text.frame.eos]
