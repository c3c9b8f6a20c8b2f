"""A kind of input for the campaign's own tests: what comes is what the seed says."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from listen_dist.errors import ListenError
from tests.fuzz.campaign import CASES_EACH
from tests.fuzz.cases import Fault

PLANTED = ("used", "refused", "ZeroDivisionError", "two lines", "Fault", "crash", "loop", "exit", "used")


def prepare(root: Path) -> Path:
    return root


def case(_: Path, chance: random.Random, folder: Path) -> str:
    state = chance.getstate()
    number = next(n for n in range(len(PLANTED)) if random.Random(f"planted/{7 * CASES_EACH + n}").getstate() == state)
    what = PLANTED[number]
    (folder / "input").write_text(what, encoding="utf-8")
    if what == "ZeroDivisionError":
        raise ZeroDivisionError("planted")
    if what in ("refused", "two lines"):
        raise ListenError("a: wrong" + ("\nb: wrong" if what == "two lines" else ""))
    if what == "Fault":
        raise Fault("not the same")
    if what == "exit":
        raise SystemExit(3)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    while what == "loop":
        pass
    return what
