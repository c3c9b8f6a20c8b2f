"""How programs end: a mistake is one line and 2, a fault keeps its traceback, whatever program it is."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from listen_dist.errors import ListenError
from listen_dist.exits import FAULT, LOST_CONTACT, MISTAKE, run

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(str(file.relative_to(ROOT)) for folder in ("listen_dist", "tools") for file in
                  (ROOT / folder).rglob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))
KINDS = [
    (ListenError("m.jsonl:3: what to do"), MISTAKE, "error: m.jsonl:3: what to do\n"),
    (OSError(28, "No space left on device", "/full"), MISTAKE, "error: [Errno 28] No space left on device: '/full'\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), MISTAKE, "error: CUDA out of memory. Tried "),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), MISTAKE, "error: [enforce "),
    (MemoryError(), MISTAKE, "error: out of memory "),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), MISTAKE, "error: DataLoader worker (pid"),
    (BrokenProcessPool("a process"), MISTAKE, "error: a worker process died"),
    (torch.distributed.DistNetworkError("gloo: peer closed\nat x.cc"), LOST_CONTACT,
     "error: a collective failed (gloo: peer closed)\n"),
    (ValueError("a bug"), FAULT, "error: ValueError: a bug\n"),
]


@pytest.fixture
def main_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], int]]:
    """A program's main function, over no arguments."""
    for folder in (ROOT / "tools", ROOT / "tools/prepare"):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["program"])

    def find(program: str) -> Callable[[], int]:
        file = ROOT / program
        inside = program.startswith("listen_dist/")
        module = importlib.import_module(program.removesuffix(".py").replace("/", ".") if inside else file.stem)
        last = re.findall(r'if __name__ == "__main__":\n((?:    .*\n|\n)+)', file.read_text(encoding="utf-8"))[-1]
        if "/prepare/" in program:
            assert last.strip() == "run_main(main)"
            return lambda: module.run_main(module.main)
        assert last.strip() == "sys.exit(main())"
        return module.main

    return find


def ending(main: Callable[[], int]) -> int:
    """The code that a program would end with."""
    try:
        return main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAULT
    except ValueError:
        return FAULT


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_ends_as_all_do(program: str, main_of: Callable[[str], Callable[[], int]],
                                  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of(program)
    for error, code, line in KINDS:
        def fail(*_: object, error: Exception = error) -> None:
            raise error

        for reading in ("parse_args", "parse_intermixed_args"):  # what a program does first: all of it is guarded
            monkeypatch.setattr(argparse.ArgumentParser, reading, fail)
        found = ending(main)
        said = capsys.readouterr()
        assert (found, said.out) == (code, "") and said.err.startswith(line), f"{error!r}: {found} {said.err}"


def test_the_programs_are_all_found() -> None:
    assert len(PROGRAMS) >= 30 and {"listen_dist/train.py", "tools/bench_data.py", "tools/prepare/iemocap.py"} < set(
        PROGRAMS)


def test_a_fault_keeps_its_traceback() -> None:
    def work() -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as raised:
        run(work)
    assert raised.traceback[-1].name == "work"


def test_the_cure_for_memory_is_the_programs_own(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert run(work, "Lower --batch-tokens") == MISTAKE
    assert capsys.readouterr().err == "error: CUDA out of memory. Lower --batch-tokens\n"
