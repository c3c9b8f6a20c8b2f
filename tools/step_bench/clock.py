"""What a stretch of work took: seconds by phase, processor seconds, peak memory, and the machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PHASES = ("data", "encoders", "llm_forward", "backward", "reduction", "optimizer")


@dataclass
class Clock:
    """Adds up seconds by phase while functions are watched; a GPU is waited for at both ends of each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    @contextmanager
    def watch(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Count the time of `owner.attribute(…)` as phase `name` while this is open."""
        own = attribute in vars(owner)
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*words: Any, **options: Any) -> Any:
            with self.phase(name):
                return original(*words, **options)

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)

    @contextmanager
    def watch_steps(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Count the time of `optimizer.step()` as phase `optimizer`; schedulers wrap that method themselves."""
        begun = [0.0]

        def before(*_: Any) -> None:
            begun[0] = self.now()

        def after(*_: Any) -> None:
            self.seconds["optimizer"] = self.seconds.get("optimizer", 0.0) + self.now() - begun[0]

        handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Peak:
    """Most memory since it was made: of the allocator on a GPU, of the process (VmHWM) elsewhere; bytes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
            except OSError:
                pass  # then it is the process's peak so far

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")


def in_use(device: torch.device) -> int:
    """Bytes in use now, as `Peak` counts them."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the best of some products of two square matrices."""
    clock, best = Clock(device), float("inf")
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(repeats):
        start = clock.now()
        a @ a
        best = min(best, clock.now() - start)
    return 2 * size**3 / best
