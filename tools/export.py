"""Write what was trained into one folder for sharing: weights, configuration, model card, fingerprints.

    python tools/export.py --checkpoint runs/quickstart --out quickstart-export
    python tools/export.py --checkpoint runs/quickstart --out small --half --results runs/quickstart/results.json
    python tools/export.py --checkpoint runs/quickstart --out careful eval.beams=4

The figures of results.json go into the model card; it must be of the same checkpoint. From predictions.jsonl beside it,
where there is one, the export learns which tasks use which prompts, for the page (`python -m listen_dist.app`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from listen_dist import config as configuration
from listen_dist import exits
from listen_dist.command_line import ConfigParser, user_path
from listen_dist.engine import checkpoint, exports
from listen_dist.evaluation.predictions import read_predictions
from listen_dist.inference.options import add_frozen_models
from listen_dist.inference.usage import usage_by_task


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=user_path,
                        help="checkpoint, or run folder (its newest one)")
    parser.add_argument("--out", required=True, type=user_path, help="folder to write; must not be there yet")
    parser.add_argument("--results", type=user_path, help="results.json of this checkpoint, for the model card")
    parser.add_argument("--notes", type=user_path, metavar="FILE",
                        help="Markdown for the end of the model card: the data it learned from, their licences")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    add_frozen_models(parser)
    parser.add_argument("overrides", nargs="*", metavar="eval.key=value",
                        help="how the export answers where the run's configuration says otherwise, e.g. eval.beams=4")
    arguments = parser.parse_intermixed_args(argv)
    for word in arguments.overrides:
        if not word.startswith("eval."):
            parser.error(f"{word!r}: what was trained cannot change in an export, only how it answers (eval.key=value)")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    return exits.run(lambda: export(parse_arguments(argv)))


def export(arguments: argparse.Namespace) -> None:
    """Write the export and print where it is."""
    source = checkpoint.resolve(arguments.checkpoint)
    checkpoint.read_state(source)
    config = configuration.load(source / "config.yaml", arguments.overrides)
    moved = {key: getattr(arguments, key) or getattr(config.model, key) for key in exports.FROZEN}
    config = replace(config, model=replace(config.model, **moved))
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results else None
    # results.json goes with predictions.jsonl, results.dev.json with predictions.dev.jsonl
    predictions = arguments.results and arguments.results.with_name(
        f"{arguments.results.name.replace('results', 'predictions', 1)}l")
    notes = arguments.notes.read_text(encoding="utf-8") if arguments.notes else ""
    usage = usage_by_task(config.pool, read_predictions(predictions)) if predictions and predictions.is_file() \
        else None
    print(exports.write(source, arguments.out, config, results, arguments.half, usage, notes))


if __name__ == "__main__":
    sys.exit(main())
