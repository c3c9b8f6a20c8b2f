"""results.json: the figures of a split, and what they depend on."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from listen_dist.config import differences, load
from listen_dist.data.manifest import file_sha256
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import ShardIndex
from listen_dist.evaluation.predictions import Prediction, to_lines, write_file
from listen_dist.evaluation.scoring import check_references, entry_for, own_scores, score_task
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import SkippedSample

PACKAGES = ("jiwer", "whisper-normalizer", "regex", "sacrebleu", "aac-metrics", "torch", "transformers")
FREE = ("model.attention", "model.checkpointing", "model.compile", "model.dtype", "model.seed", "model.init_from",
        "model.init_projector", "pool.top_k", "pool.backend", "pool.train_k_max", "pool.stochastic_k",
        "pool.match_weight", "projector.freeze", "projector.init_from", "projector.start")
"""Keys of the model that may differ between training and evaluation."""


def provenance(config: Config, path: Path, split: str, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a split's texts depend on; an interrupted evaluation goes on only where all of it is the same.

    Args:
        path: the checkpoint.
        fingerprints: of the split's sets, by their path.
    """
    decoding = asdict(config.eval)
    for key in ("splits", "llm", "batch_tokens", "report"):  # they change no text, but for rounding
        del decoding[key]
    return {"checkpoint": str(path), "checkpoint_sha256": file_sha256(path / "trainables.safetensors"), "split": split,
            "k": config.pool.k, "decoding": decoding, "model": asdict(config.model),
            "stored_features": config.data.stored_features, "data_fingerprints": dict(fingerprints),
            "code_commit": code_commit(), "versions": versions()}


def versions() -> dict[str, str]:
    """Of the packages that figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def score_and_write(folder: Path, suffix: str, facts: Mapping[str, Any], predictions: Sequence[Prediction],
                    skipped: Sequence[SkippedSample]) -> dict[str, Any]:
    """Score a split and write its three files; results.json last, so that it stands for all.

    Args:
        suffix: between the files' names and their endings.
        facts: what results.json holds besides the scores.

    Returns:
        what results.json holds.
    """
    check_references(predictions)
    tasks: dict[str, Any] = {}
    left_out = Counter(sample.task for sample in skipped)
    own: dict[int, dict[str, float | None]] = {}
    for name in dict.fromkeys(row.task for row in predictions):
        places = [place for place, row in enumerate(predictions) if row.task == name]
        rows = [predictions[place] for place in places]
        scores = score_task(name, rows)
        tasks[name] = entry_for(name, rows, scores) | {"skipped": left_out[name]}
        own |= dict(zip(places, own_scores(scores, len(rows)), strict=True))
    results = {"format_version": 2, "tasks": tasks, "skipped": len(skipped), **facts}
    write_file(folder / f"predictions{suffix}.jsonl", "".join(
        json.dumps(asdict(row) | own[place], ensure_ascii=False) + "\n" for place, row in enumerate(predictions)))
    write_file(folder / f"eval_skipped{suffix}.jsonl", to_lines(skipped))
    write_file(folder / f"results{suffix}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(tasks), flush=True)
    for name, count in left_out.items():
        whole = count + (tasks[name]["samples"] if name in tasks else 0)
        rest = "the figures are of the rest" if name in tasks else "there is no figure"
        print(f"{name}: {count} of {whole} samples could not be used; {rest}", flush=True)
    print(f"{len(skipped)} samples skipped. Details: {folder / f'results{suffix}.json'}, "
          f"{folder / f'predictions{suffix}.jsonl'}", flush=True)
    return results


def code_commit() -> str:
    """The git commit of the code, `+` behind it when files differ; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    out = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"], cwd=here,
                         capture_output=True, encoding="utf-8", check=False)
    return out.stdout.strip()


def check_same_model(path: Path, config: Config) -> Config:
    """Refuse to evaluate a checkpoint under another model's configuration.

    Whether the frozen models are the same is told by their content (see `exports.check_frozen`), not their paths.

    Returns:
        the configuration that the checkpoint was written with.

    Raises:
        ConfigError: naming the keys that differ, and the cure.
    """
    saved = load(path / "config.yaml")
    frozen = ("model.llm", "model.speech_encoder", "model.audio_encoder")
    differing = [key for key in differences(saved, config)
                 if key.startswith(("model.", "projector.", "pool.", "lora.")) and key not in (*FREE, *frozen)]
    if differing:
        raise ConfigError(f"{path}: belongs to another model; these keys differ: {', '.join(differing[:5])}. "
                          f"Evaluate with --config {path / 'config.yaml'}, or choose another --checkpoint")
    return saved


def untrained_tasks(saved: Config, tasks: set[str]) -> list[str]:
    """Those of the tasks that the checkpoint never saw; none where its training sets are not here to ask.

    An export names none, for they are another machine's folders.
    """
    if not saved.data.train:
        return []
    try:
        trained = {task for entry in saved.data.train for task in ShardIndex.load(entry.path, saved.data).tasks}
    except ShardError:
        return []
    return sorted(tasks - trained)


def table(tasks: Mapping[str, Any]) -> str:
    """Tasks beside their trivial baselines, for people."""
    lines = [f"{'task':<22}{'samples':>8}{'skipped':>9}  {'metric':<10}{'model':>8}  {'95 % interval':<18}"
             f"{'baseline':>8}   baseline is"]
    for name, entry in tasks.items():
        metric = entry["metric"]
        start = f"{name:<22}{entry['samples']:>8}{entry.get('skipped', 0):>9}  {metric:<10}"
        ours, theirs = entry["metrics"].get(metric), entry["baseline"].get(metric)
        if ours is None:
            lines.append(f"{start}{entry['not_computed'][metric]}")
            continue
        low, high = entry["intervals"][metric]
        mark = "better" if (ours < theirs) == (entry["better"] == "lower") and ours != theirs else "NOT better"
        span = f"{low:.3f} … {high:.3f}"
        lines.append(f"{start}{ours:>8.3f}  {span:<18}{theirs:>8.3f}   "
                     f"{entry['baseline_name']} ({mark}; {entry['better']} is better)")
        lines += [f"    {line}" for line in remarks(entry)]
    return "\n".join(lines)


def remarks(entry: Mapping[str, Any]) -> list[str]:
    """What a task's main figure alone hides: which mistakes there are, and answers that were cut."""
    lines = []
    metrics, by_letter = entry["metrics"], entry["metric"] == "cer"
    if entry["metric"] in ("wer", "cer") and metrics:
        prefix, unit = ("character_", "characters") if by_letter else ("", "words")
        parts = (f"{int(metrics[f'{prefix}{kind}s'])} {kind}s ({100 * metrics[f'{prefix}{kind}_share']:.1f} %)"
                 for kind in ("substitution", "deletion", "insertion"))
        lines.append(f"of {int(metrics[f'reference_{unit}'])} reference {unit}: {', '.join(parts)}")
    ended = entry.get("ended_by", {})
    if ended.get("line"):
        lines.append(f"{ended['line']} answers would have gone on after their line's end, and were cut there")
    if ended.get("limit"):
        lines.append(f"{ended['limit']} answers reached the limit of tokens")
    if entry.get("references_without_words"):
        lines.append(f"{entry['references_without_words']} references hold no word; what is said to them is insertions")
    return lines
