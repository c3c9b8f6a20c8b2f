"""One optimizer step, exact over unequal ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from listen_dist import dist
from listen_dist.engine.optim import learning_rate, set_learning_rate
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.errors import ListenError
from listen_dist.models.listen import Listen
from listen_dist.schema import Config
from listen_dist.structures import Batch, ModelOutput


class NonFiniteError(ListenError):
    """Too many steps in a row had to be left out."""


@dataclass(frozen=True)
class StepResult:
    """What one step did. Tensors stay on the device."""

    outputs: list[tuple[Batch, ModelOutput]]
    """This rank's micro-batches that counted."""
    grad_norm: torch.Tensor
    applied: bool
    """False where the loss or the gradient was not finite and the step was left out on all ranks."""
    stop: bool
    """Some rank was asked to stop; the same on every rank."""
    k: int
    rate: float


def train_step(model: Listen, replicated: ReplicatedTrainables, optimizer: torch.optim.Optimizer, config: Config,
               step: int, last: int, batches: Sequence[Batch], filler: Batch, stop: bool = False) -> StepResult:
    """Run optimizer step `step` of `last` on this rank's micro-batches of the global batch.

    The loss is the mean over all target tokens of the global batch, weighted by `train.task_weights`, plus
    λ times the mean match loss over its rows, whatever the ranks hold. Every rank passes equally many
    batches; an empty one (nothing usable in it) is replaced by `filler` with weight zero,
    because under ZeRO-3 every rank must take part in every gather. `stop` says that this
    rank was asked to stop; the ranks learn of each other's in the one reduction.
    """
    def weight(task: str) -> float:
        return config.train.task_weights.get(task, 1.0)

    counts = torch.tensor([sum(weight(task) * len(ids) for batch in batches
                               for task, ids in zip(batch.tasks, batch.target_ids, strict=True)),
                           sum(map(len, batches))], dtype=torch.float64, device=model.device)
    counts = dist.sum_(counts)
    tokens, rows = torch.where(counts > 0, counts, 1.0).float().unbind()
    k = dist.draw_k(config.train.seed, step, config.pool.k_max) if config.pool.stochastic_k else config.pool.k_max
    rate = learning_rate(config.train, step, last)
    set_learning_rate(optimizer, rate)
    dist.seed_step(config.train.seed, step)
    replicated.zero_grads()
    heard = [batch if len(batch) else filler for batch in batches]
    # Before the loop: a copy to the GPU waits for what it still has to do.
    weights = [torch.tensor(list(map(weight, batch.tasks)), device=model.device) for batch in heard]
    outputs = []
    total = torch.zeros((), device=model.device)
    observed = torch.zeros(model.pool.observed, device=model.device)
    for batch, used, row_weights in zip(batches, heard, weights, strict=True):
        counted = len(batch) > 0
        out = model(used, k)
        loss = (row_weights * out.row_loss).sum() / tokens + config.pool.match_weight * out.match_loss_sum / rows
        (loss if counted else loss * 0.0).backward()
        if counted:
            outputs.append((batch, out))
            total += loss.detach()
            observed += out.observed
    loss_sum, votes, observed = replicated.reduce(total, stop, observed)
    norm = replicated.clip(config.train.clip_norm)
    # The one wait of a step. All ranks decide alike, because they hold the same sums.
    applied, stopping = torch.stack([torch.isfinite(norm) & torch.isfinite(loss_sum), votes > 0]).tolist()
    if applied:
        optimizer.step()
        model.pool.update(observed)
    return StepResult(outputs, norm, applied, stopping, k, rate)
