"""Feed the programs generated and mutated inputs for a while, and report what is wrong.

    python -m tests.fuzz --minutes 60 --seed 7              # all kinds, the time shared evenly
    python -m tests.fuzz --minutes 5 --kind audio --json
    python -m tests.fuzz --kind audio --case 7000012        # one case again, here, with its traceback

Right is: an input that is used, a sample that is skipped by name, one line of error. Wrong is any other exception, a
hang, a crash, memory beyond a bound, samples that are not finite, or the same bytes read in two ways. Each fault says
how to repeat it; its input stays in --kept. Ctrl-C and SIGTERM end with the summary. Exit code 1: faults were found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.cases import KINDS, run_case


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="default 5")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other inputs (default 0)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind; may be repeated")
    parser.add_argument("--case", type=int, metavar="N", help="with --kind: run one case again, in this process")
    parser.add_argument("--cpu-seconds", type=int, default=20, help="a case that computes longer hangs (default 20)")
    parser.add_argument("--kept", type=Path, default=Path("runs/fuzz"), help="for inputs of faults (default runs/fuzz)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args()
    if options.case is not None and len(options.kind or ()) != 1:
        parser.error("--case needs one --kind")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        return _again(options, Path(root)) if options.case is not None else _campaign(options, Path(root))


def _campaign(options: argparse.Namespace, root: Path) -> int:
    kinds = {kind: KINDS[kind] for kind in options.kind or KINDS}
    run = campaign.Campaign(kinds, options.seed, root, options.kept, options.cpu_seconds)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.stop)
    start = said = time.monotonic()
    for result in run.run(60 * options.minutes):
        if result.outcome == "fault" and run.causes[result.kind, result.cause] == 1:
            print(campaign.report(result), file=sys.stderr, flush=True)
        if time.monotonic() - said >= 60:
            said = time.monotonic()
            counts = ", ".join(f"{kind} {tally.inputs}" for kind, tally in run.tallies.items())
            print(
                f"{(said - start) / 60:.0f} min: {counts}; {len(run.causes)} causes of faults",
                file=sys.stderr,
                flush=True,
            )
    summary = {"minutes": round((time.monotonic() - start) / 60, 1), **run.summary()}
    print(json.dumps(summary, indent=1) if options.json else campaign.table(summary), flush=True)
    if run.faults:
        print(f"inputs and tracebacks: {options.kept}/KIND-N/", file=sys.stderr)
    return 1 if run.faults else 0


def _again(options: argparse.Namespace, root: Path) -> int:
    (kind,) = options.kind
    folder = options.kept / f"{kind}-{options.case}"
    result = run_case(kind, KINDS[kind], import_module(KINDS[kind]).prepare(root), options.case, folder)
    print(f"{result.outcome}: {result.cause}\n{result.detail}".rstrip(": \n"))
    if result.outcome == "fault":
        print(f"its input: {folder}/")
    return result.outcome == "fault"


if __name__ == "__main__":
    sys.exit(main())
