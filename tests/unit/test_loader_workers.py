"""Loader processes: a dead or raising one is an error at once, an ended iterator leaves none, memory stays bounded."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from torch.utils.data import Dataset

from listen_dist import evaluate, train
from listen_dist.data.collate import collate
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader, _batches, training_steps
from listen_dist.data.mixture import Mixture
from listen_dist.data.remote import SourceError
from listen_dist.data.schedule import TokenCost
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.errors import LoaderError
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import SetConfig
from listen_dist.structures import Batch, LoaderState
from tests import launching, tiny

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]

BAD = 10


class Empty(Dataset[Batch]):
    """Empty batches; item BAD can't be read."""

    def __getitem__(self, place: int) -> Batch:
        if place == BAD:
            raise SourceError("https://host/shard-000003.tar: no answer; try again")
        return collate([], False, [])


def children() -> list[psutil.Process]:
    """The running loader processes (not Python's own tracker of shared resources)."""
    running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in running if "spawn_main" in " ".join(child.cmdline())]


def endless(start: int) -> Iterator[Batch]:
    return _batches(Empty(), itertools.count(start), workers=2)  # type: ignore[arg-type]


def test_a_raising_worker_is_an_error_with_its_message_first_then_its_traceback_and_leaves_none() -> None:
    # Keeps no traceback: that would keep the worker processes alive.
    with pytest.raises(SourceError, match=r"(?s)\Ahttps://host/shard-000003.tar: no answer; try again\n.*worker process"
                                          r".*Traceback.*__getitem__"):
        for place, _ in enumerate(endless(0)):
            assert place < BAD
    assert not psutil.wait_procs(children(), timeout=30)[1]


def test_a_killed_worker_is_an_error_with_a_traceback_and_no_hang(tmp_path: Path) -> None:
    # A program of its own: torch tells of a dead worker by a signal, which would hit whatever test runs then.
    log = tmp_path / "log"
    process = launching.start([sys.executable, "-m", "tests.unit.killed_loader", "worker"], log)
    family: list[psutil.Process] = []
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [child for child in psutil.Process(process.pid).children() if child not in family]
        time.sleep(0.05)
    ended = launching.wait(process, log, 1)
    assert ended.code == 1 and "Traceback" in ended.output
    assert re.search(r"(?s)LoaderError: DataLoader worker .*(killed|exited).*\nA loader process died\.", ended.output)
    assert len(family) >= 2 and not psutil.wait_procs(family, timeout=60)[1], "processes outlive the program"


def test_workers_end_with_a_trainer_that_is_killed_while_they_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = launching.start([sys.executable, "-m", "tests.unit.killed_loader", "trainer"], log)
    ended = launching.wait(process, log, 200)
    assert ended.code == -9
    # A worker that had no time to read what it should do may add a traceback of its own.
    numbers = re.search(r"(?m)^(\d+) (\d+)$", ended.output)
    assert numbers, ended.output
    left = [psutil.Process(int(pid)) for pid in numbers.groups() if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(left, timeout=150)[1]


@pytest.mark.parametrize(("program", "part"), [(train, "run_program"), (evaluate, "evaluate")])
@pytest.mark.parametrize("kind", [RuntimeError, LoaderError])
def test_programs_tell_of_a_killed_worker_in_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                  program: ModuleType, part: str, kind: type[RuntimeError]) -> None:
    said = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    error = said if kind is RuntimeError else LoaderError.of(said)
    assert error is not None

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(program, "parse_arguments", lambda _: ())
    monkeypatch.setattr(program, part, fail)
    assert program.main([]) == 2
    assert re.search(r"(?m)^error: DataLoader worker .*killed.*\nA loader process died", capsys.readouterr().err)


def test_memory_does_not_grow_with_the_number_of_batches(tiny_world: tiny.Tiny) -> None:
    config = tiny_world.config("data.batch_tokens=40")
    reader = BatchReader([ShardIndex.load(tiny_world.speech)], LogMel.from_pretrained(config.model.speech_encoder),
                         TextEncoder(load_tokenizer(config.model.llm), config.model), config.data, True)
    mixture = Mixture(reader.indexes, [SetConfig("set")], 0)
    steps = training_steps(reader, mixture, TokenCost(5, 10.0), config.data, 0, 1, 0, 1, LoaderState())
    process, sizes, read = psutil.Process(), [], 0
    for _ in range(3):
        for batches, _ in itertools.islice(steps, 300):
            read += sum(batch.audio.numel() * 4 for batch in batches)
        sizes.append(process.memory_info().rss)
    assert read > 50e6
    assert sizes[-1] - sizes[0] < 8e6
