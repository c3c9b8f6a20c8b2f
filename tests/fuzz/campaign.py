"""The loop: which kind comes next, a worker that may die, what was found, the summary."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Result
from tests.launching import ROOT

CASES_EACH = 1_000_000
"""Case n of seed s has the seed s · CASES_EACH + n."""
CASES_OF_A_WORKER = 400
"""Then it is replaced, and what it has grown by is looked at."""
MOST_GROWTH = 1000
"""MiB over those cases."""
KEPT_OF_A_CAUSE = 3
MOST_KEPT = 100
MOST_KEPT_BYTES = 1 << 29
START_SECONDS = 300.0


@dataclass
class Tally:
    """What one kind has come to."""

    inputs: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


class Worker:
    """A process of worker.py.

    Args:
        cpu_seconds: of one case; a case may take six times as long by the clock, since others may use the cores.
    """

    def __init__(self, root: Path, folder: Path, cpu_seconds: int) -> None:
        self._cpu_seconds, self._log = cpu_seconds, root / "worker.log"
        self.folder, self.cases, self.started_with = folder, 0, 0
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", root, folder, str(cpu_seconds)],
                cwd=ROOT,
                stderr=log,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        self.kinds: set[str] = set()
        """Whose world is there."""

    def run(self, kind: str, module: str, seed: int) -> Result:
        """Run one case; a crash or a hang is a fault too, and ends the worker."""
        # A kind's first case also imports the package and builds its world.
        limit = 6.0 * self._cpu_seconds + (0 if kind in self.kinds else START_SECONDS)
        self.kinds.add(kind)
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{kind} {module} {seed}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._ended(kind, seed)
        if not self._ready.select(limit):
            self._process.kill()
            return Result(kind, seed, "fault", f"hangs for {limit:.0f} s", self._said())
        line = self._process.stdout.readline()
        if not line:
            return self._ended(kind, seed)
        self.cases += 1
        result = Result(**json.loads(line))
        self.started_with = self.started_with or result.mebibytes
        return result

    def _ended(self, kind: str, seed: int) -> Result:
        code = self._process.wait()
        if "tests/fuzz/sounds.py" in self._said():  # an encoder of theirs crashed: there is no input
            return Result(kind, seed, "unwritten")
        if code == -signal.SIGXCPU:
            return Result(kind, seed, "fault", f"hangs: {self._cpu_seconds} s of computing", self._said())
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Result(kind, seed, "fault", f"the process dies: {name}{self._place()}", self._said())

    def _place(self) -> str:
        """The first line of ours in what faulthandler wrote."""
        for line in self._said().splitlines():
            if "/listen_dist/" in line and line.lstrip().startswith("File"):
                return " at" + line.split("/listen_dist/", 1)[1].replace('"', "")
        return ""

    def _said(self) -> str:
        # The rest is a list of 200 extension modules.
        return self._log.read_text(encoding="utf-8", errors="replace").split("\nExtension modules:")[0][-6000:]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._ready.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


class Campaign:
    """Cases of several kinds, the time shared evenly between them.

    Args:
        kinds: module by name.
        root: for the tiny world and the case in work.
        kept: where the inputs of faults are left.
    """

    def __init__(self, kinds: Mapping[str, str], seed: int, root: Path, kept: Path, cpu_seconds: int = 20) -> None:
        self.kinds, self.seed, self.root, self.kept, self.cpu_seconds = kinds, seed, root, kept, cpu_seconds
        self.tallies = {kind: Tally() for kind in kinds}
        self.faults: list[Result] = []
        """The first of each cause, of which inputs are kept."""
        self.causes: Counter[tuple[str, str]] = Counter()
        self._kept_bytes = 0
        self._worker: Worker | None = None
        self._stopped = False

    def stop(self, *_: object) -> None:
        """End now, in the middle of a case; fit as a handler of signals."""
        self._stopped = True
        if self._worker:
            self._worker.kill()

    def run(self, seconds: float, most: int = sys.maxsize) -> Iterator[Result]:
        """Run cases for a while, or until there are `most` of each kind; yields every result."""
        end = time.monotonic() + seconds
        try:
            while not self._stopped and time.monotonic() < end:
                left = [kind for kind in self.kinds if self.tallies[kind].inputs < most]
                if not left:
                    return
                result = self._one(min(left, key=lambda name: self.tallies[name].seconds))
                if result:
                    yield result
        finally:
            if self._worker:
                self._worker.close()
            self._worker = None

    def _one(self, kind: str) -> Result | None:
        tally = self.tallies[kind]
        worker = self._worker = self._worker or Worker(self.root, self.root / "case", self.cpu_seconds)
        first, start = kind not in worker.kinds, time.monotonic()
        result = worker.run(kind, self.kinds[kind], self.seed * CASES_EACH + tally.inputs)
        if self._stopped:  # which may have killed the worker
            return None
        tally.inputs += 1
        if not first or result.outcome == "fault":  # else mostly its world was built
            tally.seconds += time.monotonic() - start
        tally.outcomes[result.outcome] += 1
        if result.outcome == "fault":
            self._keep(result)
        if not worker.alive or result.outcome == "fault" and not result.mebibytes:
            worker.close()
            self._worker = None
        elif worker.cases >= CASES_OF_A_WORKER:
            grown = result.mebibytes - worker.started_with
            worker.close()
            self._worker = None
            if grown > MOST_GROWTH:
                self._note(
                    Result(
                        kind,
                        result.seed,
                        "fault",
                        f"{CASES_OF_A_WORKER} cases that end with this one leave over {MOST_GROWTH} MiB behind",
                        f"{grown} MiB",
                    )
                )
        return result

    def _note(self, result: Result) -> bool:
        """Count a fault; whether it is among the first of its cause."""
        self.causes[result.kind, result.cause] += 1
        first = self.causes[result.kind, result.cause] <= KEPT_OF_A_CAUSE and len(self.faults) < MOST_KEPT
        if first:
            self.faults.append(result)
        return first

    def _keep(self, result: Result) -> None:
        case = self.root / "case"
        if self._note(result) and case.is_dir():
            size = sum(path.lstat().st_size for path in case.rglob("*"))
            place = self.kept / f"{result.kind}-{result.seed}"
            if self._kept_bytes + size <= MOST_KEPT_BYTES:
                self._kept_bytes += size
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(case, place, symlinks=True)
                (place / "fault.txt").write_text(f"{report(result)}\n{result.detail}", encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """Everything, as a tree for JSON."""
        kinds = {
            kind: {
                "inputs": tally.inputs,
                "per_minute": round(60 * tally.inputs / max(tally.seconds, 1e-9), 1),
                "outcomes": dict(tally.outcomes.most_common()),
                "causes": sum(name == kind for name, _ in self.causes),
            }
            for kind, tally in self.tallies.items()
        }
        return {
            "seed": self.seed,
            "kinds": kinds,
            "faults": [asdict(fault) for fault in self.faults],
            "causes": [
                {"kind": kind, "cause": cause, "times": times} for (kind, cause), times in self.causes.most_common()
            ],
        }


def report(fault: Result) -> str:
    """What one line says of a fault."""
    again = f"python -m tests.fuzz --kind {fault.kind} --case {fault.seed}"
    return f"FAULT {fault.kind} {fault.seed}: {fault.cause}\n  {again}"


def table(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    rows = [f"{'kind':<12}{'inputs':>9}{'a minute':>10}{'causes':>8}  outcomes"]
    for kind, entry in summary["kinds"].items():
        outcomes = ", ".join(f"{name} {count}" for name, count in entry["outcomes"].items())
        rows.append(f"{kind:<12}{entry['inputs']:>9}{entry['per_minute']:>10}{entry['causes']:>8}  {outcomes}")
    for entry in summary["causes"]:
        first = next(
            (
                fault["seed"]
                for fault in summary["faults"]
                if (fault["kind"], fault["cause"]) == (entry["kind"], entry["cause"])
            ),
            None,
        )
        rows.append(f"{entry['times']:>6} times  {entry['kind']} {first}: {entry['cause']}")
    return "\n".join(rows)
