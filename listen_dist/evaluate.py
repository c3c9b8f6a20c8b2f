"""Decode and score the test (or dev) sets of a config with a trained checkpoint.

    deepspeed --num_gpus 2 listen_dist/evaluate.py --config runs/quickstart/config.yaml
    python listen_dist/evaluate.py --config runs/quickstart/config.yaml eval.beams=4 --out runs/quickstart/beam4

Writes results.json and predictions.jsonl into --out and prints a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A launched script's own folder comes first on sys.path and would shadow other packages' modules.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from listen_dist import config as configuration
from listen_dist import dist, logs
from listen_dist.config import Config, ConfigError
from listen_dist.data.shards import ShardError
from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import assemble
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.evaluation.decoding import Prediction, decode_set
from listen_dist.evaluation.metrics import baseline_hypotheses, task_scores
from listen_dist.structures import SkippedSample
from listen_dist.tasks import get_task

logger = logging.getLogger("listen_dist.evaluate")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, e.g. the config.yaml of a run folder")
    parser.add_argument("--checkpoint", help="checkpoint or run folder (default: the newest of run_dir)")
    parser.add_argument("--out", help="where results go (default: run_dir)")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, e.g. eval.beams=4")
    # intermixed: overrides may stand before and after the options
    arguments = parser.parse_intermixed_args(argv)
    return arguments, configuration.load(arguments.config, arguments.overrides)


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """results.json's entry for each task: its metrics beside those of the trivial baseline."""
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(p.task for p in predictions):
        rows = [p for p in predictions if p.task == name]
        answers = [p.answers for p in rows]
        baseline, constant = baseline_hypotheses(name, answers)
        task = get_task(name)
        odds = log_odds(rows)
        tasks[name] = {
            "samples": len(rows), "metric": task.metric, "better": task.better,
            "metrics": task_scores(name, [p.text for p in rows], answers, odds),
            "baseline": task_scores(name, constant, answers, [0.0] * len(odds)), "baseline_name": baseline,
            "answered_by": dict(Counter("likelihood" if p.choices else "generation" for p in rows)),
            "instruction": task.instruction or "the sample's own question",
        }
    return tasks


def log_odds(rows: Sequence[Prediction]) -> list[float]:
    """log p(yes) − log p(no) of each sample where all were asked so, and both answers occur; else empty."""
    if {p.choices for p in rows} not in ({("yes", "no")}, {("no", "yes")}) or len({p.answers[0] for p in rows}) < 2:
        return []
    return [p.likelihoods[p.choices.index("yes")] - p.likelihoods[p.choices.index("no")] for p in rows]


def provenance(config: Config, path: Path, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("jiwer", "whisper-normalizer", "sacrebleu", "aac-metrics", "torch", "transformers")
    return {
        "checkpoint": str(path), "split": config.eval.split, "k": config.pool.k, "decoding": asdict(config.eval),
        "normalizer": "Whisper's: English rules for WER, basic for choices and captions",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "data_fingerprints": fingerprints, "code_commit": code_commit(), "ranks": dist.world_size(),
    }


def code_commit() -> str:
    """The git commit of the code, `+` behind it when files differ; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    out = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"], cwd=here,
                         capture_output=True, text=True, check=False)
    return out.stdout.strip()


def write_results(folder: Path, results: dict[str, Any], predictions: Sequence[Prediction],
                  skipped: Sequence[SkippedSample]) -> None:
    """Each file beside its place first, then renamed, so that no half file is ever read."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "predictions.jsonl": "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions),
        "eval_skipped.jsonl": "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in skipped),
        "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        beside = folder / f".{name}.tmp"
        beside.write_text(text)
        os.replace(beside, folder / name)


def table(tasks: dict[str, Any]) -> str:
    """Tasks beside their trivial baselines, for people."""
    lines = [f"{'task':<22}{'samples':>8}  {'metric':<10}{'model':>8}{'baseline':>10}   baseline is"]
    for name, entry in tasks.items():
        metric = entry["metric"]
        ours, theirs = entry["metrics"][metric], entry["baseline"][metric]
        mark = "better" if (ours < theirs) == (entry["better"] == "lower") and ours != theirs else "NOT better"
        lines.append(f"{name:<22}{entry['samples']:>8}  {metric:<10}{ours:>8.3f}{theirs:>10.3f}   "
                     f"{entry['baseline_name']} ({mark}; {entry['better']} is better)")
    return "\n".join(lines)


def evaluate(arguments: argparse.Namespace, config: Config) -> int:
    device = dist.setup(config.device, config.parallel.timeout_minutes)
    logs.setup()
    path = checkpoint.resolve(Path(arguments.checkpoint or config.run_dir))
    state = checkpoint.read_state(path)
    sets = getattr(config.data, config.eval.split)
    if not sets:
        raise ConfigError(f"data.{config.eval.split}: no set to evaluate; name one, or another eval.split")
    parts = assemble(config, device)
    checkpoint.load_trainables(path, parts.model.trainable)
    parts.model.eval()
    predictions: list[Prediction] = []
    skipped: list[SkippedSample] = []
    fingerprints: dict[str, str] = {}
    with parts.sharding.whole():
        for entry in sets:
            reader = parts.reader([entry], with_targets=False)
            fingerprints[entry.path] = reader.indexes[0].fingerprint
            decoded, unread = decode_set(parts, reader, config.eval, config.pool.k)
            predictions += decoded
            skipped += unread
    if dist.is_main():
        tasks = score(predictions)
        results = {"format_version": 1, "step": state.step, "tasks": tasks, "skipped": len(skipped),
                   **provenance(config, path, fingerprints)}
        out = Path(arguments.out or config.run_dir)
        write_results(out, results, predictions, skipped)
        print(table(tasks), flush=True)
        print(f"{len(skipped)} samples skipped. Details: {out / 'results.json'}, {out / 'predictions.jsonl'}",
              flush=True)
    dist.barrier()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; a known mistake ends it with one line instead of a traceback."""
    try:
        return evaluate(*parse_arguments(argv))
    except (ConfigError, CheckpointError, ShardError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(main())
