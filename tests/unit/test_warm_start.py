"""The least-squares start of the projector against numpy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import SampleRef
from listen_dist.engine import warm_start
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.errors import ListenError
from listen_dist.structures import Batch
from tests import tiny


def parts_and_batches(world: tiny.Tiny, monkeypatch: pytest.MonkeyPatch) -> tuple[Parts, list[Batch]]:
    monkeypatch.setattr(warm_start, "RIDGE", 0.0)
    parts = assemble(world.config("parallel.llm=replicated", "projector.hidden=8"), torch.device("cpu"))
    reader: BatchReader = parts.reader(parts.config.data.train, with_targets=True)
    return parts, [reader[[SampleRef(0, shard, row) for row in range(4)]] for shard in range(4)] + [
        reader[[SampleRef(1, 0, row) for row in range(4)]]]


def test_it_is_the_least_squares_solution(tiny_world: tiny.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, batches = parts_and_batches(tiny_world, monkeypatch)
    rows, targets = [], []
    table = parts.model.llm.get_input_embeddings().weight
    for batch in batches:  # clip by clip, window by window
        hidden, counts = parts.model.projector.hidden(*parts.model.frames(batch))
        for i, task in enumerate(batch.tasks):
            said = batch.target_ids[i][:-1]
            whole = table[said].mean(0)
            for window in range(int(counts[i])):
                place = int((window + 0.5) * len(said) / int(counts[i]))
                rows.append([*hidden[i, window].tolist(), 1.0])
                targets.append((table[said[place]] if task == "asr" else whole).tolist())
    x, y = np.array(rows), np.array(targets)
    weight = np.linalg.lstsq(x, y, rcond=None)[0][:-1]
    weight *= (y.var(0).sum() / (x[:, :-1] @ weight).var(0).sum()) ** 0.5
    warm_start.fit_last_layer(parts.model, batches)
    out = parts.model.projector.out
    np.testing.assert_allclose(out.weight.detach().numpy().T, weight, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(out.bias.detach().numpy(), y.mean(0) - x[:, :-1].mean(0) @ weight, rtol=1e-3, atol=1e-3)


def test_without_a_clip_it_says_so(tiny_world: tiny.Tiny) -> None:
    parts = assemble(tiny_world.config("parallel.llm=replicated"), torch.device("cpu"))
    with pytest.raises(ListenError, match="no usable clip"):
        warm_start.fit_last_layer(parts.model, [])
