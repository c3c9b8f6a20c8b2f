"""Sums of what happened since the last report, joined over ranks by one all-reduce."""

from __future__ import annotations

import math
import time

import torch

from listen_dist import dist
from listen_dist.engine.step import StepResult
from listen_dist.structures import Batch
from listen_dist.tasks import TASKS

_FIELDS = ("token_loss", "tokens", "mass", "mass_per_key", "rows", "input_tokens", "padded_tokens", "seconds",
           "skipped", "waiting", "elapsed", "steps_left_out")


class Meter:
    """Collects tensors without waiting for them; `report` reads them out once.

    Args:
        prompts: N, to count how often each prompt is used.
        device: where the sums live.
        skipped: samples skipped before this process started.
    """

    def __init__(self, prompts: int, device: torch.device, skipped: int = 0) -> None:
        self._tasks = list(TASKS)
        self._prompts = prompts
        self._device = device
        self.skipped = skipped
        """Samples skipped so far by all ranks."""
        self.elapsed = 0.0
        """Seconds reported so far, the mean over ranks."""
        self._clear()

    def _clear(self) -> None:
        self._sums = dict.fromkeys(_FIELDS, torch.zeros((), dtype=torch.float64, device=self._device))
        self._task_sums = torch.zeros(len(self._tasks), 2, dtype=torch.float64, device=self._device)
        self._usage = torch.zeros(self._prompts, dtype=torch.float64, device=self._device)
        self._waiting = 0.0
        self._step_tokens: list[int] = []
        self._start = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loader let the step wait for so long."""
        self._waiting += seconds

    def add(self, result: StepResult, batches: list[Batch]) -> None:
        """Take in one step of this rank."""
        def count(field: str, value: torch.Tensor | float) -> None:
            self._sums[field] = self._sums[field] + value

        count("skipped", sum(len(batch.skipped) for batch in batches))
        count("steps_left_out", (~result.applied).double())
        self._step_tokens.append(sum(out.input_tokens for _, out in result.outputs))
        for batch, out in result.outputs:
            count("token_loss", out.token_loss_sum.detach())
            count("tokens", out.target_tokens)
            count("mass", -out.match_loss_sum.detach())
            count("mass_per_key", -out.match_loss_sum.detach() / result.k)
            count("rows", out.rows)
            count("input_tokens", out.input_tokens)
            count("padded_tokens", out.padded_tokens)
            count("seconds", sum(batch.seconds))
            chosen = out.prompt_indices.flatten()
            self._usage += torch.bincount(chosen[chosen >= 0], minlength=self._prompts)
            place = torch.tensor([self._tasks.index(task) for task in batch.tasks], device=self._device)
            sizes = torch.tensor([len(ids) for ids in batch.target_ids], device=self._device)
            self._task_sums.index_add_(0, place, torch.stack([out.row_loss, sizes], dim=1).double())

    def report(self) -> dict[str, float]:
        """Join the sums of all ranks, clear them, and turn them into metrics. Every rank must call it."""
        self._sums["waiting"] = self._sums["waiting"] + self._waiting
        self._sums["elapsed"] = self._sums["elapsed"] + (time.perf_counter() - self._start)
        # A row a rank; the others' rows are zero here and come by the sum.
        step_tokens = torch.zeros(dist.world_size(), len(self._step_tokens), dtype=torch.float64, device=self._device)
        step_tokens[dist.rank()] = torch.tensor(self._step_tokens)
        flat = torch.cat([torch.stack(list(self._sums.values())), self._task_sums.flatten(), self._usage,
                          step_tokens.flatten()])
        values = dist.sum_(flat).tolist()
        sums = dict(zip(_FIELDS, values, strict=False))
        tasks = values[len(_FIELDS) : len(_FIELDS) + 2 * len(self._tasks)]
        usage_end = len(values) - step_tokens.numel()
        usage = values[len(_FIELDS) + 2 * len(self._tasks) : usage_end]
        self._clear()
        self.skipped += int(sums["skipped"])
        seconds = sums["elapsed"] / dist.world_size()
        self.elapsed += seconds
        rows = max(1.0, sums["rows"])
        metrics = {
            "loss": sums["token_loss"] / max(1.0, sums["tokens"]),
            "match_loss": -sums["mass"] / rows,
            "match_loss_per_key": -sums["mass_per_key"] / rows,
            "clips_per_second": sums["rows"] / seconds,
            "tokens_per_second": sums["input_tokens"] / seconds,
            "audio_seconds_per_second": sums["seconds"] / seconds,
            "padding_share": 1 - sums["input_tokens"] / max(1.0, sums["padded_tokens"]),
            "token_imbalance": imbalance(torch.tensor(values[usage_end:]).view(dist.world_size(), -1)),
            "waiting_share": sums["waiting"] / max(1e-9, sums["elapsed"]),
            "effective_prompts": effective_number(usage),
            "skipped_samples": float(self.skipped),
            "elapsed_seconds": self.elapsed,
            "skipped_steps": sums["steps_left_out"] / dist.world_size(),
        }
        for i, task in enumerate(self._tasks):
            if tasks[2 * i + 1]:
                metrics[f"loss_{task}"] = tasks[2 * i] / tasks[2 * i + 1]
        return metrics


def effective_number(usage: list[float]) -> float:
    """exp(entropy) of a usage histogram: how many prompts are in use, 1 … N."""
    total = sum(usage)
    return math.exp(-sum(u / total * math.log(u / total) for u in usage if u)) if total else 0.0


def imbalance(tokens: torch.Tensor) -> float:
    """By how much the fullest rank's tokens exceed the mean over ranks, averaged over steps; `tokens` [ranks, steps].

    The others wait for the fullest one, so 0.05 means that about 5 % of the time is lost.
    """
    return float((tokens.amax(0) / tokens.mean(0).clamp(min=1) - 1).mean())
