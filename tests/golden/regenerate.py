"""Write tests/golden/losses.json anew, after a change that is meant to change numbers.

    python tests/golden/regenerate.py

Say in the commit why the curve changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent / "losses.json"
sys.path[:] = [str(FILE.parents[2]), *(p for p in sys.path if Path(p or ".").resolve() != FILE.parent)]

import torch  # noqa: E402

from listen_dist import train  # noqa: E402
from tests import tiny  # noqa: E402

WORDS = ("train.max_steps=8", "train.batches_per_step=2", "parallel.llm=replicated")
KEPT = ("step", "loss", "match_loss", "grad_norm")


def losses(world: tiny.Tiny, run_dir: Path) -> list[dict[str, float]]:
    """Train the tiny model for eight steps in fp32 on this process; what it reported at each."""
    torch.set_num_threads(1)
    code = train.main(["--config", str(world.config_file), f"run_dir={run_dir}", *WORDS])
    if code:
        raise SystemExit(code)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in KEPT} for line in lines]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        curve = losses(tiny.build(Path(folder) / "tiny"), Path(folder) / "run")
    FILE.write_text(json.dumps(curve, indent=1) + "\n")
    print(f"wrote {FILE}")
