"""Write tests/golden/losses.json anew, after a change that is meant to change numbers.

    python tests/golden/regenerate.py

Say in the commit why the curve changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "losses.json"
sys.path[:] = [str(FILE.parents[2]), *(p for p in sys.path if Path(p or ".").resolve() != FILE.parent)]

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from listen_dist import train  # noqa: E402
from tests import tiny  # noqa: E402

WORDS = ("train.max_steps=8", "train.batches_per_step=2", "parallel.llm=replicated")
KEPT = ("step", "loss", "match_loss", "grad_norm")


class _Doubled(TorchFunctionMode):
    """Gives float64 wherever the code asks for float32."""

    def __torch_function__(self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {key: _doubled(value) for key, value in (kwargs or {}).items()}
        return function(*map(_doubled, args), **named)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_double() -> Iterator[None]:
    """Everything in float64, from the log-mel to the optimizer.

    In float32 processors differ in the last bits of their sums; by the fourth step that is 1.5e-6 of a gradient's norm.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)


def losses(folder: Path) -> list[dict[str, float]]:
    """Train the tiny model for eight steps in float64 on this process; what it reported at each."""
    with in_double():
        world = tiny.build(folder / "tiny")
        code = train.main(["--config", str(world.config_file), f"run_dir={folder / 'run'}", *WORDS])
    if code:
        raise SystemExit(code)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT} for line in lines]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        curve = losses(Path(scratch))
    FILE.write_text(json.dumps(curve, indent=1) + "\n")
    print(f"wrote {FILE}")
