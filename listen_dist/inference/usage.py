"""Which tasks usually use which prompts: from the evaluation of a run, or as an export brings it along."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from listen_dist.engine import exports
from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import Prediction, read_predictions
from listen_dist.evaluation.prompts import Choices
from listen_dist.schema import PoolConfig


def usage_by_task(pool: PoolConfig, rows: Sequence[Prediction]) -> dict[str, list[float]]:
    """Each task's usage of the prompts, [N] each: the share of its clips that had the prompt in front."""
    tasks = [row.task for row in rows]
    size = max((prompt for row in rows for prompt in row.prompts), default=-1) + 1
    table = Choices(tasks, [row.prompts for row in rows], [row.scores for row in rows], max(size, pool.prompts),
                    weighted=pool.selection == "attention").membership()
    return {task: table[np.array([task == other for other in tasks])].mean(0).round(4).tolist()
            for task in sorted(set(tasks))}


def known_usage(checkpoint: Path, pool: PoolConfig) -> dict[str, list[float]]:
    """The usage by task that goes with a resolved checkpoint or export; empty where nobody evaluated it.

    For a checkpoint in a run folder, the predictions of the run are taken if its results.json is of this checkpoint.
    """
    if (checkpoint / "export.json").is_file():
        return exports.read_usage(checkpoint)
    run = checkpoint.parent.parent
    try:
        of = json.loads((run / "results.json").read_text(encoding="utf-8")).get("checkpoint_sha256")
        if of == hashlib.sha256((checkpoint / "trainables.safetensors").read_bytes()).hexdigest():
            return usage_by_task(pool, read_predictions(run / "predictions.jsonl"))
    except (ListenError, OSError, ValueError, AttributeError):
        pass  # the page works without
    return {}
