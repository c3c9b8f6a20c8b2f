"""Decode and score the test (or dev) sets of a config with a trained checkpoint.

    deepspeed --num_gpus 2 listen_dist/evaluate.py --config runs/quickstart/config.yaml
    python listen_dist/evaluate.py --config runs/quickstart/config.yaml eval.beams=4 --out runs/quickstart/beam4

Writes results.json, predictions.jsonl and the pool's report into --out and prints a table. Started again
after an interruption, it goes on where it was.
"""

from __future__ import annotations

import sys
from os.path import expanduser
from pathlib import Path

# A launched script's own folder comes first on sys.path and would shadow other packages' modules. The folder above
# it stands there instead: a script of this checkout runs its code, wherever else the package is installed.
sys.path[:] = [str(Path(__file__).resolve().parents[1]),
               *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]

import argparse

from listen_dist.command_line import ConfigParser


def build_parser() -> argparse.ArgumentParser:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, required=True,
                        help="YAML file, e.g. the config.yaml of a run folder")
    parser.add_argument("--checkpoint", type=expanduser,
                        help="checkpoint, export or run folder (default: the newest of run_dir)")
    parser.add_argument("--out", type=expanduser, help="where results go (default: run_dir)")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, e.g. eval.beams=4")
    return parser


if __name__ == "__main__":
    # Before torch is imported, which takes seconds: --help and a wrong option are answered at once.
    build_parser().parse_intermixed_args()

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from listen_dist import config as configuration
from listen_dist import dist, exits, logs
from listen_dist.data.decode import AudioError
from listen_dist.data.shards import ShardError
from listen_dist.engine import checkpoint, exports
from listen_dist.engine.assembly import Parts, assemble, with_pool_tasks
from listen_dist.engine.run_lock import RunLock
from listen_dist.errors import print_in_any_locale
from listen_dist.evaluation import predictions as files
from listen_dist.evaluation import report
from listen_dist.evaluation.decoding import Decoder, check_ids
from listen_dist.evaluation.placement import placed
from listen_dist.evaluation.predictions import PartialFile, Prediction
from listen_dist.evaluation.report import Evaluated, ReportError
from listen_dist.evaluation.results import check_same_model, provenance, score_and_write, untrained_tasks
from listen_dist.schema import Config, ConfigError, SetConfig
from listen_dist.structures import SkippedSample

logger = logging.getLogger("listen_dist.evaluate")


@dataclass(frozen=True)
class Places:
    """Where an evaluation reads and writes."""

    checkpoint: Path
    out: Path


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


def evaluate_split(decoder: Decoder, split: str, sets: Sequence[SetConfig], places: Places, saved: Config,
                   step: int) -> None:
    """Decode, score, write and report on one split.

    Args:
        saved: the configuration that the checkpoint was trained with.
        step: of the checkpoint.
    """
    parts, config = decoder.parts, decoder.parts.config
    indexes = parts.reader(sets, with_targets=False).indexes
    fingerprints = {entry.path: index.fingerprint for entry, index in zip(sets, indexes, strict=True)}
    if len(set(fingerprints.values())) < len(sets):
        raise ConfigError(f"data.{split}: names a set twice, whose samples would count twice; name it once")
    origin = provenance(config, places.checkpoint, split, fingerprints) | {
        "k": parts.model.pool.prompt_tokens(config.pool.k)}
    partial = places.out / f"partial.{split}"
    predictions, skipped = decode_split(decoder, sets, origin, partial)
    suffix = "" if len(config.eval.splits) == 1 else f".{split}"
    untrained = untrained_tasks(saved, {row.task for row in predictions})
    facts = {"step": step, **origin, "ranks": dist.world_size(), "llm": "whole" if decoder.whole else "sharded",
             "batch_tokens": config.eval.batch_tokens, "untrained_tasks": untrained}
    results = dist.on_main(score_and_write, places.out, suffix, facts, predictions, skipped)
    if untrained and dist.is_main():
        print(f"never trained in this checkpoint: {', '.join(untrained)}", flush=True)
    dist.on_main(files.clear, partial)
    if config.eval.report and config.pool.selection != "none":
        rows = [asdict(row) for row in predictions]
        write_report(Evaluated(places.out, config, results, rows, suffix), parts)


def write_report(run: Evaluated, parts: Parts) -> None:
    """Open the pool; the scores are written, so what is wrong with it ends nothing."""
    try:
        page = report.make(run, parts)
        logger.info("the pool, opened: %s", page)
    except (ReportError, ShardError, AudioError, OSError) as error:
        logger.warning("no report: %s", error)


@contextmanager
def folder_of_our_own(folder: Path) -> Iterator[None]:
    """Hold the folder of results for this evaluation, tried before anything is loaded; rank 0 does."""
    held: list[RunLock] = []

    def claim() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(1 << 16))  # a full disk takes an empty file
                file.flush()
            held.append(RunLock(folder, ".evaluation.lock", "--out"))
        except OSError as error:
            raise ConfigError(f"--out = {str(folder)!r}: cannot be written: {error}; choose another folder") from error

    dist.on_main(claim)
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def evaluate(arguments: argparse.Namespace, config: Config) -> int:
    device = dist.setup(config.device, config.parallel.timeout_minutes)
    logs.setup()
    path = exports.resolve(Path(arguments.checkpoint or config.run_dir))
    step = exports.step_of(path)
    config = with_pool_tasks(config)
    splits = {split: sets_of(config, split) for split in config.eval.splits}
    saved = check_same_model(path, config)
    exports.check_frozen(path, config)
    for split in splits:
        dist.on_main(check_ids, split, config)
    places = Places(path, Path(arguments.out or config.run_dir))
    with folder_of_our_own(places.out):
        parts = assemble(config, device)
        checkpoint.load_trainables(path, parts.model.trainable)
        parts.model.eval()
        with placed(parts) as whole:
            decoder = Decoder(parts, config.eval, config.pool.k, whole)
            for split, sets in splits.items():
                evaluate_split(decoder, split, sets, places, saved, step)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; a known mistake ends it with one line instead of a traceback."""
    print_in_any_locale()
    code = exits.FAULT
    try:
        code = exits.run(lambda: evaluate(*parse_arguments(argv)),
                         "Lower eval.batch_tokens or eval.beams, or set eval.llm=sharded")
    finally:
        dist.shutdown(failed=code != 0)
    return code


if __name__ == "__main__":
    sys.exit(main())
