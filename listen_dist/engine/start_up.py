"""Where the time from the command to the first step goes."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")


class StartUp:
    """Seconds by part, from the start of the oldest launcher above this process, or of this one without a launcher."""

    def __init__(self) -> None:
        process = psutil.Process()
        born = process.create_time()
        above = [one.create_time() for one in process.parents() if _launches(one)]
        self.parts = {"launcher": born - min(above)} if above else {}
        self._last = born

    def lap(self, part: str) -> None:
        """What was since the last call belongs to `part`."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.parts.items())
        return f"{sum(self.parts.values()):.1f} s from the command to the end of the first step: {parts}"


def _launches(process: psutil.Process) -> bool:
    """A Slurm step's processes start at their own pace, so srun is none."""
    try:
        return any(Path(word).name in LAUNCHERS for word in process.cmdline()[:4])
    except psutil.Error:
        return False
