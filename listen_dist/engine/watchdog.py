"""Notices that a run stands still, and says which rank the others wait for.

Two threads a rank. The watch looks at its own clock: without a `beat` for so long it writes the Python
stacks of this process to stacks-rankN.txt and, on the lowest rank that still answers, logs a diagnosis.
The pulse tells a key-value store (a TCP server in rank 0, apart from the one the collectives meet over)
that this process lives, and where its main thread stands, and reads the same of the other ranks. A rank
whose pulse stops is dead, stopped or cut off; one that lives but is not waiting in a collective while
others are holds them up.

Only the monotonic clock is used, and each rank measures the others' pulses by its own.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore

from listen_dist import dist

logger = logging.getLogger(__name__)

_NO_PLACE = ("listen_dist/dist.py", "engine/watchdog.py")
"""Lines of the package that say nothing about where a rank stands."""
_WAITING = ("/torch/distributed/", "/deepspeed/", "/listen_dist/dist.py")
"""Where the innermost Python frame lies while a rank waits for others."""


@dataclass(frozen=True)
class Pulse:
    """What a rank last said of itself."""

    who: str
    """Process and machine."""
    step: int
    place: str
    """The line of this package that its main thread is at."""
    waiting: bool
    """It waits for other ranks there."""
    heard: float
    """Our monotonic clock when its count last moved."""
    count: int


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this package on a stack, what it calls, and whether that waits for other ranks."""
    if frame is None:
        return "nowhere", False
    innermost, ours = frame, None
    while frame is not None and ours is None:
        name = frame.f_code.co_filename
        if "listen_dist/" in name and not name.endswith(_NO_PLACE):
            ours = frame
        frame = frame.f_back
    shown = [ours] if ours is innermost or ours is None else [ours, innermost]
    text = " > ".join(f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}" for f in shown if f)
    return text or innermost.f_code.co_name, any(part in innermost.f_code.co_filename for part in _WAITING)


class Watchdog:
    """Watches the loop while it is open; every rank must open it.

    Args:
        seconds: how long a run may stand still before it is said.
        folder: where the stacks go.
        step: steps that are done already, where a run goes on.
    """

    def __init__(self, seconds: float, folder: Path, step: int = 0) -> None:
        self._seconds = seconds
        self._interval = min(5.0, seconds / 6)
        self._file = folder / f"stacks-rank{dist.rank()}.txt"
        self._main = threading.get_ident()
        self._rank, self._world = dist.rank(), dist.world_size()
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._pulses: dict[int, Pulse] = {}
        self._step, self._beat = step, time.monotonic()
        self._asked = self._heard = self._beat
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        threads = [self._watch]
        if self._world > 1:
            self._store = self._connect()
            # All have spoken before any goes on: a rank that stops at once is known by name.
            self._say(count=0)
            dist.barrier()
            self._listen()
            threads.append(self._pulse)
        self._beat = time.monotonic()
        for target in threads:
            self._threads.append(threading.Thread(target=target, name=target.__name__, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and dist.lost_contact(error):
            self._name_the_lost()
        self._closed.set()
        # Python ends a daemon thread that is inside the store's C++ by aborting the whole process.
        for thread in self._threads:
            thread.join(10)

    def _name_the_lost(self) -> None:
        """A collective failed: who is it that stopped answering? A pulse is missed only after a while."""
        deadline = time.monotonic() + 4 * self._interval
        while not self.silent() and time.monotonic() < deadline:
            time.sleep(self._interval / 4)
        logger.error("lost contact after step %d: %s", self._step, self.diagnosis())

    def beat(self, step: int) -> None:
        """Progress was made: `step` steps are done."""
        self._step, self._beat = step, time.monotonic()

    def _connect(self) -> TCPStore:
        host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        store = TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False) if self._rank == 0 else None
        port = dist.broadcast_object(store.port if store else 0)
        return store or TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)

    def _pulse(self) -> None:
        count = 0
        try:
            while not self._closed.wait(self._interval):
                count += 1
                self._asked = time.monotonic()
                self._say(count)
                self._listen()
        except RuntimeError:  # rank 0 is gone, and its store with it; the watch says so
            pass

    def _say(self, count: int) -> None:
        place, waiting = place_of(sys._current_frames().get(self._main))
        self._store.set(f"{self._rank}", json.dumps([self._who, self._step, place, waiting, count]))

    def _listen(self) -> None:
        for rank, pulse in enumerate(self._store.multi_get([f"{rank}" for rank in range(self._world)])):
            self._note(rank, *json.loads(pulse))
        self._heard = time.monotonic()

    def _note(self, rank: int, who: str, step: int, place: str, waiting: bool, count: int) -> None:
        known = self._pulses.get(rank)
        heard = known.heard if known is not None and known.count == count else time.monotonic()
        self._pulses[rank] = Pulse(who, step, place, waiting, heard, count)

    def _watch(self) -> None:
        told = 0.0
        while not self._closed.wait(self._interval):
            still = time.monotonic() - self._beat
            if still > self._seconds and told != self._beat:
                told = self._beat
                self._write_stacks(still)
                silent = self.silent()
                if self._rank == min(set(range(self._world)) - set(silent), default=0):
                    logger.error("no progress for %.0f s after step %d: %s. Python stacks of every rank that answers: "
                                 "%s", still, self._step, self.diagnosis(), self._file.with_name("stacks-rank*.txt"))

    def _write_stacks(self, still: float) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._who}: no progress for {still:.0f} s after "
                           f"step {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.warning("%s: %s", self._file, error)

    def silent(self) -> list[int]:
        """Ranks that no longer answer: dead, stopped, or their machine is gone.

        On a busy machine this process may itself have come late to listen, so that the others are not measured
        by the time now, but by the time when it last did.
        """
        patience = 2.5 * self._interval
        if self._asked > self._heard and time.monotonic() - self._asked > patience:
            return [0]  # the store answers no more, and rank 0 keeps it
        return [rank for rank, pulse in sorted(self._pulses.items())
                if rank != self._rank and self._heard - pulse.heard > patience]

    def diagnosis(self) -> str:
        """Which rank holds the run up, and what the others wait in."""
        if self._world == 1:
            return f"this process is at {place_of(sys._current_frames().get(self._main))[0]}"
        silent = self.silent()
        culprits = silent or self._holding_up()
        lines = [self._line(rank, "does not answer (dead, stopped or cut off); it was last"
                            if rank in silent else "holds the others up; it is") for rank in culprits[:8]]
        waiting: dict[str, list[int]] = {}
        for rank, pulse in sorted(self._pulses.items()):
            if rank not in culprits:
                waiting.setdefault(pulse.place, []).append(rank)
        if not culprits:
            return f"all ranks are at {next(iter(waiting))}"
        lines += [f"rank {ranks[0]} waits in {place}" if len(ranks) == 1 else f"ranks {_short(ranks)} wait in {place}"
                  for place, ranks in waiting.items()]
        return "; ".join(lines)

    def _holding_up(self) -> list[int]:
        """Who the others wait for, among ranks that all answer; none where all stand at one place."""
        awake = [rank for rank, pulse in sorted(self._pulses.items()) if not pulse.waiting]
        if len(awake) < len(self._pulses):
            return awake
        # NCCL's calls return at once; a rank waits where it next needs a number from its GPU. So most of them do.
        (usual, most), *others = Counter(pulse.place for pulse in self._pulses.values()).most_common()
        if others and others[0][1] == most:
            return awake
        return [rank for rank in awake if self._pulses[rank].place != usual]

    def _line(self, rank: int, what: str) -> str:
        pulse = self._pulses.get(rank)
        if pulse is None:
            return f"rank {rank} {what} never heard of"
        return f"rank {rank} ({pulse.who}) {what} at {pulse.place} after step {pulse.step}"


def _short(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"{listed} and {len(ranks) - 8} more" if len(ranks) > 8 else listed
