"""Decode and score the test (or dev) sets of a config with a trained checkpoint.

    deepspeed --num_gpus 2 listen_dist/evaluate.py --config runs/quickstart/config.yaml
    python listen_dist/evaluate.py --config runs/quickstart/config.yaml eval.beams=4 --out runs/quickstart/beam4

Writes results.json and predictions.jsonl into --out and prints a table. Started again after an
interruption, it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A launched script's own folder comes first on sys.path and would shadow other packages' modules.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, e.g. the config.yaml of a run folder")
    parser.add_argument("--checkpoint", help="checkpoint or run folder (default: the newest of run_dir)")
    parser.add_argument("--out", help="where results go (default: run_dir)")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, e.g. eval.beams=4")
    return parser


if __name__ == "__main__":
    # Before torch is imported, which takes seconds: --help and a wrong option are answered at once.
    build_parser().parse_intermixed_args()

import json
import logging
from collections.abc import Sequence
from typing import Any

from listen_dist import config as configuration
from listen_dist import dist, logs
from listen_dist.data.loader import LoaderError
from listen_dist.data.shards import ShardError
from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import assemble, with_pool_tasks
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.evaluation import predictions as files
from listen_dist.evaluation.decoding import Decoder
from listen_dist.evaluation.placement import placed
from listen_dist.evaluation.predictions import PartialFile, Prediction
from listen_dist.evaluation.results import check_same_model, provenance, table, untrained_tasks
from listen_dist.evaluation.scoring import check_references, entry_for
from listen_dist.schema import Config, ConfigError, SetConfig
from listen_dist.structures import SkippedSample

logger = logging.getLogger("listen_dist.evaluate")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    # intermixed: overrides may stand before and after the options
    arguments = build_parser().parse_intermixed_args(argv)
    return arguments, configuration.load(arguments.config, arguments.overrides)


def sets_of(config: Config, split: str) -> list[SetConfig]:
    sets: list[SetConfig] = getattr(config.data, split)
    if not sets:
        raise ConfigError(f"data.{split}: no set to evaluate; name one, or another in eval.splits")
    return sets


def decode_split(decoder: Decoder, sets: Sequence[SetConfig], header: dict[str, Any], partial: Path,
                 ) -> tuple[list[Prediction], list[SkippedSample]]:
    """Every sample of the sets once, an interrupted evaluation's results taken over."""
    done = dist.on_main(files.take_over, partial, header)
    finished = sum(map(len, done.values()))
    if finished:
        logger.info("going on from %s: %d samples are decoded already", partial, finished)
    file = PartialFile(partial, dist.rank())
    predictions: list[Prediction] = []
    skipped: list[SkippedSample] = []
    for entry in sets:
        reader = decoder.parts.reader([entry], with_targets=False)
        decoded, unread = decoder.decode_set(reader, done.get(reader.indexes[0].fingerprint, []), file)
        predictions += decoded
        skipped += unread
    file.close()
    return predictions, skipped


def score_and_write(folder: Path, suffix: str, facts: dict[str, Any], saved: Config,
                    predictions: Sequence[Prediction], skipped: Sequence[SkippedSample]) -> None:
    """Score a split and write its three files; results.json last, so that it stands for all.

    Args:
        facts: what results.json holds besides the scores.
        saved: the configuration that the checkpoint was trained with.
    """
    check_references(predictions)
    names = dict.fromkeys(row.task for row in predictions)
    tasks = {name: entry_for(name, [row for row in predictions if row.task == name]) for name in names}
    untrained = untrained_tasks(saved, set(tasks))
    results = {"format_version": 2, "tasks": tasks, "skipped": len(skipped), "untrained_tasks": untrained, **facts}
    files.write_file(folder / f"predictions{suffix}.jsonl", files.to_lines(predictions))
    files.write_file(folder / f"eval_skipped{suffix}.jsonl", files.to_lines(skipped))
    files.write_file(folder / f"results{suffix}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(tasks), flush=True)
    if untrained:
        print(f"never trained in this checkpoint: {', '.join(untrained)}", flush=True)
    print(f"{len(skipped)} samples skipped. Details: {folder / f'results{suffix}.json'}, "
          f"{folder / f'predictions{suffix}.jsonl'}", flush=True)


def evaluate(arguments: argparse.Namespace, config: Config) -> int:
    device = dist.setup(config.device, config.parallel.timeout_minutes)
    logs.setup()
    path = checkpoint.resolve(Path(arguments.checkpoint or config.run_dir))
    state = checkpoint.read_state(path)
    config = with_pool_tasks(config)
    splits = {split: sets_of(config, split) for split in config.eval.splits}
    saved = check_same_model(path, config)
    parts = assemble(config, device)
    checkpoint.load_trainables(path, parts.model.trainable)
    parts.model.eval()
    out = Path(arguments.out or config.run_dir)
    with placed(parts) as whole:
        decoder = Decoder(parts, config.eval, config.pool.k, whole)
        for split, sets in splits.items():
            indexes = parts.reader(sets, with_targets=False).indexes
            fingerprints = {entry.path: index.fingerprint for entry, index in zip(sets, indexes, strict=True)}
            if len(set(fingerprints.values())) < len(sets):
                raise ConfigError(f"data.{split}: names a set twice, whose samples would count twice; name it once")
            origin = provenance(config, path, split, fingerprints) | {
                "k": parts.model.pool.prompt_tokens(config.pool.k)}
            partial = out / f"partial.{split}"
            predictions, skipped = decode_split(decoder, sets, origin, partial)
            suffix = "" if len(splits) == 1 else f".{split}"
            facts = {"step": state.step, **origin, "ranks": dist.world_size(), "llm": "whole" if whole else "sharded"}
            dist.on_main(score_and_write, out, suffix, facts, saved, predictions, skipped)
            dist.on_main(files.clear, partial)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; a known mistake ends it with one line instead of a traceback."""
    try:
        return evaluate(*parse_arguments(argv))
    except (ConfigError, CheckpointError, ShardError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not (died := LoaderError.of(error)):
            raise
        print(f"error: {died}", file=sys.stderr, flush=True)
        return 2
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(main())
