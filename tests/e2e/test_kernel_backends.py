"""Training with the Triton kernels and with the reference is the same training."""

from __future__ import annotations

import pytest
import torch

from listen_dist import dist
from listen_dist.data.loader import find_filler, training_steps
from listen_dist.engine.assembly import assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.structures import LoaderState
from tests import tiny

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

STEPS = 6


def curve(world: tiny.Tiny, backend: str, device: str) -> tuple[list[float], list[list[int]]]:
    """Losses of the first steps, and all prompts picked in each."""
    config = world.config(f"pool.backend={backend}", "parallel.llm=replicated")
    parts = assemble(config, torch.device(device))
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    reader = parts.reader(config.data.train, with_targets=True)
    steps = training_steps(reader, parts.mixture(reader), parts.token_cost(config.pool.k_max),
                           config.data, config.train.seed, 1, dist.rank(), 1, LoaderState())
    losses, picked = [], []
    for step in range(STEPS):
        batches, _ = next(steps)
        result = train_step(parts.model.train(), replicated, optimizer, config, step, config.train.max_steps, batches,
                            find_filler(reader))
        out = result.outputs[0][1]
        losses.append(float(out.token_loss_sum / out.target_tokens + out.match_loss_sum / out.rows))
        picked.append(out.prompt_indices.flatten().tolist())
    return losses, picked


def test_the_curve_and_the_prompts_are_the_same(tiny_world: tiny.Tiny) -> None:
    """On a GPU the kernels run there; elsewhere Triton's interpreter runs them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, reference = curve(tiny_world, "triton", device), curve(tiny_world, "reference", device)
    assert ours[1] == reference[1]
    assert ours[0] == pytest.approx(reference[0], rel=1e-5)
    assert ours[0][-1] != ours[0][0], "nothing was learned"
