"""Sums of what happened since the last report, joined over ranks by one all-reduce."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from listen_dist import dist
from listen_dist.data.remote import take_retries
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
        skipped: samples skipped until the last report before this process started.
        start: the sums since that report, from `state`.
        hosts: of the network sources, to count how often each had to be asked again; the same on every rank.
    """

    def __init__(self, prompts: int, device: torch.device, skipped: int = 0,
                 start: Mapping[str, Any] | None = None, hosts: Iterable[str] = ()) -> None:
        self._tasks = list(TASKS)
        self._prompts = prompts
        self._device = device
        self.retries = dict.fromkeys(sorted(hosts), 0)
        """Tries that failed and were made again between the last two reports, of all ranks, by host."""
        self._retried: Counter[str] = Counter()
        self.skipped = skipped
        """Samples skipped so far by all ranks."""
        self.elapsed = 0.0
        """Seconds reported so far, the mean over ranks."""
        self._clear()
        if start:
            self._go_on(start)

    def _clear(self) -> None:
        self._sums = dict.fromkeys(_FIELDS, torch.zeros((), dtype=torch.float64, device=self._device))
        self._task_sums = torch.zeros(len(self._tasks), 2, dtype=torch.float64, device=self._device)
        self._usage = torch.zeros(len(self._tasks), self._prompts, dtype=torch.float64, device=self._device)
        self._waiting = 0.0
        self._step_tokens: list[int] = []
        self._start = time.perf_counter()

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Take up earlier sums; they are of all ranks together, so one rank alone does."""
        self.elapsed = -state["sums"]["elapsed"]  # counts this process's time only
        for field in ("elapsed", "waiting"):
            self._sums[field] = self._sums[field] + state["sums"][field]
        if dist.is_main():
            for field in (name for name in state["sums"] if name not in ("elapsed", "waiting")):
                self._sums[field] = self._sums[field] + state["sums"][field]
            for task, sums in state["tasks"].items():
                self._task_sums[self._tasks.index(task)] = torch.tensor(sums, dtype=torch.float64)
            self._usage += torch.tensor(state["usage"], device=self._device)

    def state(self) -> dict[str, Any]:
        """The sums of all ranks since the last report, for a checkpoint: a run that is resumed between two
        reports reports what the unbroken one would. Every rank must call it."""
        sums, tasks, usage, _ = self._joined()
        for field in ("elapsed", "waiting"):
            sums[field] /= dist.world_size()
        return {"sums": sums, "tasks": tasks, "usage": usage.tolist()}

    def waited(self, seconds: float) -> None:
        """The loader let the step wait for so long."""
        self._waiting += seconds

    def add(self, result: StepResult, batches: list[Batch]) -> None:
        """Take in one step of this rank."""
        def count(field: str, value: torch.Tensor | float) -> None:
            self._sums[field] = self._sums[field] + value

        count("skipped", sum(len(batch.skipped) for batch in batches))
        for batch in batches:
            self._retried.update(batch.retries)
        if dist.is_main():  # all ranks leave out the same steps
            count("steps_left_out", float(not result.applied))
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
            place = torch.tensor([self._tasks.index(task) for task in batch.tasks], device=self._device)
            cells = (place[:, None] * self._prompts + out.prompt_indices)[out.prompt_indices >= 0]
            self._usage += torch.bincount(cells, minlength=self._usage.numel()).view_as(self._usage)
            sizes = torch.tensor([len(ids) for ids in batch.target_ids], device=self._device)
            self._task_sums.index_add_(0, place, torch.stack([out.row_loss.detach(), sizes], dim=1).double())

    def _joined(self) -> tuple[dict[str, float], dict[str, list[float]], np.ndarray, float]:
        """Over all ranks: the sums; loss and tokens of each task that was there; how often each task
        used each prompt [tasks, N];
        how unevenly the steps of this process were spread."""
        now = time.perf_counter()
        self._sums["waiting"] = self._sums["waiting"] + self._waiting
        self._sums["elapsed"] = self._sums["elapsed"] + (now - self._start)
        self._waiting, self._start = 0.0, now
        # A row a rank; the others' rows are zero here and come by the sum.
        step_tokens = torch.zeros(dist.world_size(), len(self._step_tokens), dtype=torch.float64, device=self._device)
        step_tokens[dist.rank()] = torch.tensor(self._step_tokens)
        flat = torch.cat([torch.stack(list(self._sums.values())), self._task_sums.flatten(), self._usage.flatten(),
                          step_tokens.flatten()])
        found = dist.sum_(flat).split([len(_FIELDS), 2 * len(self._tasks), self._usage.numel(), step_tokens.numel()])
        sums = dict(zip(_FIELDS, found[0].tolist(), strict=True))
        tasks = {task: pair for task, pair in zip(self._tasks, found[1].view(-1, 2).tolist(), strict=True) if pair[1]}
        usage = found[2].view_as(self._usage).cpu().numpy()
        return sums, tasks, usage, imbalance(found[3].view(dist.world_size(), -1))

    def _join_retries(self) -> dict[str, float]:
        """Take over what all ranks had to ask for again; the metrics of it, none without a network source."""
        self._retried.update(take_retries())
        if self.retries:
            counts = torch.tensor([self._retried[host] for host in self.retries], dtype=torch.float64)
            self.retries = dict(zip(self.retries, map(int, dist.sum_(counts.to(self._device)).tolist()), strict=True))
        self._retried.clear()
        return {f"retries_{re.sub('[^A-Za-z0-9.-]', '_', host)}": float(n) for host, n in self.retries.items()}

    def report(self) -> dict[str, float]:
        """Join the sums of all ranks, clear them, and turn them into metrics. Every rank must call it."""
        sums, tasks, usage, unevenness = self._joined()
        self._clear()
        self.skipped += int(sums["skipped"])
        seconds = sums["elapsed"] / dist.world_size()
        self.elapsed += seconds
        rows = max(1.0, sums["rows"])
        metrics = {  # no loss where no clip was usable
            **({"loss": sums["token_loss"] / sums["tokens"]} if sums["tokens"] else {}),
            **({"match_loss": -sums["mass"] / rows, "match_loss_per_key": -sums["mass_per_key"] / rows}
               if sums["rows"] else {}),
            "clips_per_second": sums["rows"] / seconds,
            "tokens_per_second": sums["input_tokens"] / seconds,
            "audio_seconds_per_second": sums["seconds"] / seconds,
            "padding_share": 1 - sums["input_tokens"] / max(1.0, sums["padded_tokens"]),
            "token_imbalance": unevenness,
            "waiting_share": sums["waiting"] / max(1e-9, sums["elapsed"]),
            "effective_prompts": effective_number(usage.sum(0)),
            "unused_prompts": unused_share(usage.sum(0)),
            "skipped_samples": float(self.skipped),
            "elapsed_seconds": self.elapsed,
            "skipped_steps": sums["steps_left_out"],
        }
        for task, (loss, tokens) in tasks.items():
            metrics[f"loss_{task}"] = loss / tokens
            of_task = usage[self._tasks.index(task)]
            metrics[f"effective_prompts_{task}"] = effective_number(of_task)
            metrics[f"unused_prompts_{task}"] = unused_share(of_task)
        return metrics | self._join_retries()


COLLAPSED = 0.2
"""Share of a pool's room for choice (see `share_in_use`) under which it has collapsed."""


def share_in_use(effective: float, k: int, prompts: int) -> float:
    """How much of its room for choice a pool uses: effective prompts beyond k, of the N − k there could be; 0 … 1."""
    return 1.0 if prompts <= k else max(0.0, effective - k) / (prompts - k)


def effective_number(usage: np.ndarray | Sequence[float]) -> float:
    """exp(entropy) of a usage histogram [N]: how many prompts are in use, 1 … N; 0 where none is."""
    counts = np.asarray(usage, dtype=float)
    share = counts[counts > 0] / max(1e-300, counts.sum())
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def unused_share(usage: np.ndarray) -> float:
    """The share of prompts that a usage histogram [N] has at zero."""
    return float((usage == 0).mean())


def imbalance(tokens: torch.Tensor) -> float:
    """By how much the fullest rank's tokens exceed the mean over ranks, averaged over steps; `tokens` [ranks, steps].

    The others wait for the fullest one, so 0.05 means that about 5 % of the time is lost.
    """
    if not tokens.numel():
        return 0.0
    return float((tokens.amax(0) / tokens.mean(0).clamp(min=1) - 1).mean())
