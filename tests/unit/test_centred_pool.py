"""The centred query against plain NumPy: its statistics, what they do to the choice, and that they are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from listen_dist import train
from listen_dist.data.mixture import SampleRef
from listen_dist.engine import checkpoint, exports
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.checkpoint import TrainState
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import DriftError, ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.models.prompt_pool import CentredPool
from listen_dist.schema import PoolConfig
from tests import tiny

WIDTH = 12


def pool(prompts: int = 8) -> CentredPool:
    torch.manual_seed(0)
    return CentredPool(PoolConfig(prompts=prompts, query="centred"), torch.zeros(WIDTH))


def contexts(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts [rows, 5, D] of 2 to 5 positions whose means lie close together, far from zero; and their mask."""
    random = torch.Generator().manual_seed(seed)
    base = 5 + torch.arange(WIDTH) % 3
    context = base + 0.1 * torch.randn(rows, 5, WIDTH, generator=random)
    lengths = torch.randint(2, 6, (rows, 1), generator=random)
    return context, torch.arange(5) < lengths


def sums_of(ours: CentredPool, context: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    ours(context, mask, [], k)
    return ours.observe()


def means(context: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return np.stack([row[: int(keep.sum())].mean(0).numpy() for row, keep in zip(context, mask, strict=True)])


def test_the_statistics_are_those_of_weighted_queries() -> None:
    """The truth keeps every query with its weight, in float64."""
    ours = pool()
    kept, weights = np.zeros((0, WIDTH)), np.zeros(0)
    for step in range(120):
        batches = [contexts(rows, 10 * step + rows) for rows in (3, 1, 5)]
        sums = sum((sums_of(ours, *batch, 2) for batch in batches), torch.zeros(ours.observed))
        ours.update(sums)
        queries = np.concatenate([means(*batch) for batch in batches]).astype(np.float64)
        weight = max(1 / (step + 1), 0.02)
        kept = np.concatenate([kept, queries])
        weights = np.concatenate([weights * (1 - weight), np.full(len(queries), weight / len(queries))])
    mean = weights @ kept
    np.testing.assert_allclose(ours.query_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(ours.query_var.numpy(), weights @ (kept - mean) ** 2, rtol=1e-3)


def test_a_step_without_a_usable_clip_changes_nothing() -> None:
    ours = pool()
    for seen in (0, 1):
        before = {name: value.clone() for name, value in ours.named_buffers()}
        ours.update(torch.zeros(ours.observed))
        assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())
        assert ours.query_steps == seen
        ours.update(sums_of(ours, *contexts(5, 1), 2))


def test_the_choice_is_that_of_centred_cosines() -> None:
    ours = pool()
    batch = contexts(6, 3)
    ours.update(sums_of(ours, *contexts(50, 4), 3))
    match = ours(*batch, [], 3)
    mean, var = ours.query_mean.numpy().astype(np.float64), ours.query_var.numpy().astype(np.float64)
    prepared = (means(*batch) - mean) / np.sqrt(var + 1e-5 * var.mean())
    keys = ours.keys.detach().numpy().astype(np.float64)
    cosine = prepared @ keys.T / np.linalg.norm(prepared, axis=1)[:, None] / np.linalg.norm(keys, axis=1)
    assert match.indices.tolist() == np.argsort(-cosine, axis=1)[:, :3].tolist()
    expected = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
    np.testing.assert_allclose(match.scores.detach().numpy(), -np.sort(-expected, axis=1)[:, :3], rtol=1e-4)


def test_queries_with_much_in_common_choose_differently() -> None:
    """What the raw query can't tell apart, the centred one can: no prompt in front of nearly all clips."""
    ours, batch = pool(), contexts(200, 5)
    raw = super(CentredPool, ours).forward(*batch, [], 2).indices
    ours.update(sums_of(ours, *batch, 2))
    centred = ours(*batch, [], 2).indices
    most = [max(torch.bincount(found.flatten(), minlength=8)) / len(found) for found in (raw, centred)]
    assert most[0] > 0.95 and most[1] < 0.6


def test_a_clips_prompts_depend_on_nothing_beside_it() -> None:
    ours = pool()
    ours.update(sums_of(ours, *contexts(50, 6), 2))
    context, mask = contexts(4, 7)
    together = ours(context, mask, [], 3)
    padding = torch.full((1, 3, WIDTH), torch.nan)
    for row in range(4):
        alone = ours(torch.cat([context[row : row + 1], padding], 1),
                     torch.cat([mask[row : row + 1], torch.zeros(1, 3, dtype=torch.bool)], 1), [], 3)
        assert alone.indices[0].tolist() == together.indices[row].tolist()


def test_the_kernel_gives_what_the_reference_gives() -> None:
    ours, batch = pool(), contexts(5, 9)
    ours.update(sums_of(ours, *contexts(50, 10), 2))
    by_reference = ours(*batch, [], 3)
    ours.backend = "triton"
    by_kernel = ours(*batch, [], 3)
    assert torch.equal(by_kernel.indices, by_reference.indices)
    assert torch.allclose(by_kernel.scores, by_reference.scores, rtol=1e-5)


def test_the_match_loss_teaches_keys_alone() -> None:
    ours, (context, mask) = pool(), contexts(4, 8)
    context.requires_grad_()
    ours(context, mask, [], 2).match_loss.backward()
    assert context.grad is None and ours.keys.grad is not None and ours.keys.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def parts(tiny_world: tiny.Tiny) -> Parts:
    return assemble(tiny_world.config("pool.query=centred", "parallel.llm=replicated"), torch.device("cpu"))


def steps(parts: Parts, loss: float | None = None) -> ReplicatedTrainables:
    """One optimizer step of two micro-batches; with `loss`, of a model whose loss is that."""
    reader = parts.reader(parts.config.data.train, with_targets=True)
    batches = [reader[[place for place in chosen]] for chosen in places(parts)]
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, parts.config.train)
    if loss is not None:
        with torch.no_grad():
            parts.model.projector.out.weight[0, 0] = loss
    train_step(parts.model.train(), replicated, optimizer, parts.config, 0, 12, batches, batches[0])
    return replicated


def places(parts: Parts) -> tuple[list[SampleRef], ...]:
    return [SampleRef(0, 0, 0), SampleRef(0, 0, 1)], [SampleRef(0, 0, 3), SampleRef(1, 0, 0), SampleRef(1, 0, 1)]


def test_a_step_takes_in_all_its_rows_and_a_checkpoint_keeps_them(parts: Parts, tmp_path: Path) -> None:
    reader = parts.reader(parts.config.data.train, with_targets=True)
    listed = [place for chosen in places(parts) for place in chosen]
    with torch.no_grad():  # before the first step nothing is centred
        queries = torch.cat([parts.model.queries(reader[[place]]) for place in listed]).numpy()
    steps(parts)
    pool = parts.model.pool
    assert isinstance(pool, CentredPool)
    np.testing.assert_allclose(pool.query_mean.numpy(), queries.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pool.query_var.numpy(), queries.var(0), rtol=1e-3, atol=1e-8)

    optimizer = build_optimizer(parts.model.trainable, parts.config.train)
    taken = checkpoint.snapshot(parts.config, TrainState(1), parts.model.trainable, optimizer)
    written = checkpoint.write(tmp_path, taken)
    other = assemble(parts.config, torch.device("cpu")).model
    checkpoint.load_trainables(written, other.trainable)
    for name in ("query_mean", "query_var", "query_steps"):
        assert torch.equal(getattr(other.pool, name), getattr(pool, name))
        assert torch.equal(load_file(written / "trainables.safetensors")[f"pool.{name}"], getattr(pool, name))

    exported = exports.write(written, tmp_path / "half", parts.config, None,
                             half=True)
    tensors = load_file(exported / "trainables.safetensors")
    assert torch.equal(tensors["pool.query_var"], pool.query_var) and tensors["pool.keys"].dtype == torch.float16
    assert f"pool {2 * 10 * 64:,}," in (exported / "README.md").read_text()

    before = pool.query_mean.clone()
    parts.model.eval()
    with torch.no_grad():
        parts.model(reader[listed], 3)
    assert torch.equal(pool.query_mean, before)  # evaluation leaves them alone

    steps(parts, loss=float("nan"))  # a step that is left out, too
    assert torch.equal(pool.query_mean, before)


def test_a_run_that_is_resumed_has_the_same_statistics(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    def run(folder: Path, *steps: int) -> dict[str, torch.Tensor]:
        for until in steps:
            words = [f"run_dir={folder}", f"train.max_steps={until}", "pool.query=centred", "train.save_every=2",
                     "parallel.llm=replicated", "train.schedule=constant"]
            assert train.main(["--config", str(tiny_world.config_file), *words]) == 0
        return load_file(checkpoint.resolve(folder) / "trainables.safetensors")

    unbroken, resumed = run(tmp_path / "a", 6), run(tmp_path / "b", 2, 6)
    assert unbroken["pool.query_steps"] == 6
    assert all(torch.equal(value, resumed[key]) for key, value in unbroken.items())


def test_ranks_that_differ_in_statistics_alone_have_drifted(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    mine = replicated.checksum()
    parts.model.pool.get_buffer("query_var")[0] += 1e-6
    monkeypatch.setattr("listen_dist.dist.gather_objects", lambda value: [mine, value])
    with pytest.raises(DriftError, match=r"ranks \[1\]"):
        replicated.prove_equal(3)
