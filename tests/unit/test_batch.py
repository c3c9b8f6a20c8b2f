"""A batch's rows: none of its fields is forgotten when some are taken or all are pinned."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from listen_dist.data.collate import Prepared, collate
from listen_dist.structures import Batch, Record, SkippedSample


def batch(rows: int) -> Batch:
    """Every field filled, no two rows alike."""
    samples = [Prepared(Record(f"clip-{i}", (), f"task-{i}", f"word {i}", language=f"l{i}"),
                        torch.full((4, 3 + i), i), [i], [i, i], float(i), (f"a{i}", f"b{i}"), ([i], [i, i]),
                        torch.full((2 + i, 5), i)) for i in range(rows)]
    return collate(samples, False, [SkippedSample("bad", "shard", "why")])


def differ(a: Any, b: Any) -> bool:
    return not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def test_some_rows_are_those_rows_in_every_field() -> None:
    whole, some = batch(4), batch(4).select([2, 0])
    assert some.ids == ["clip-2", "clip-0"] and some.skipped == [] and len(whole.select([])) == 0
    for name in (item.name for item in fields(Batch) if item.name not in ("skipped", "is_features", "retries")):
        column, taken = getattr(whole, name), getattr(some, name)
        assert column is not None and len(column) == 4 and len(taken) == 2, name
        for place, row in enumerate((2, 0)):
            assert not differ(taken[place], column[row]), name
        assert differ(taken[0], taken[1]), f"{name}: equal rows show nothing"
    assert some.is_features is whole.is_features
    assert replace(whole, retries={"host": 2}).select([0]).retries == {}


def test_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    whole = batch(2)
    after = whole.pin_memory()
    tensors = [getattr(whole, item.name) for item in fields(Batch)
               if isinstance(getattr(whole, item.name), torch.Tensor)]
    assert len(tensors) == 4 and {id(tensor) for tensor in pinned} == {id(tensor) for tensor in tensors}
    assert after.ids == whole.ids and after.skipped == whole.skipped
