"""A page for the browser: drop or record audio, choose a task or ask, see the answer and the prompts behind it.

    python -m listen_dist.app --checkpoint runs/quickstart
    python -m listen_dist.app --checkpoint shared --llm DIR --speech-encoder DIR --port 8000

The page is served to this machine alone (127.0.0.1); `--host 0.0.0.0` lets others in, and there is no password.
Nothing is loaded from elsewhere. Uploads lie in a temporary folder that goes away with the program; no other file
can be reached through the page. Stop it with Ctrl-C.

Exit codes: 0 stopped by Ctrl-C or SIGTERM; 2 wrong usage, no usable checkpoint or frozen model, or the port is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser

from listen_dist import exits
from listen_dist.inference.options import add_model


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m listen_dist.app", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=expanduser, default="latest", metavar="DIR",
                        help="export, checkpoint or run folder; `latest` (default): the newest checkpoint below runs/")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="address to listen at (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860; 0: any free one")
    parser.add_argument("--max-seconds", type=float, default=600.0, metavar="S",
                        help="longest recording (default 600)")
    parser.add_argument("--max-megabytes", type=float, default=50.0, metavar="M", help="largest file (default 50)")
    parser.add_argument("--top-k", type=int, metavar="K", help="prompts to pick (default: as trained)")
    add_model(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port < 65536:
        parser.error("--port: must be 0 … 65535")
    if not (arguments.max_seconds > 0 and arguments.max_megabytes > 0):
        parser.error("--max-seconds, --max-megabytes: must be above 0")
    return arguments


def serve(arguments: argparse.Namespace) -> int:
    # torch and transformers take seconds, which neither --help nor a wrong option needs.
    from listen_dist.inference import serving

    return serving.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    try:
        return exits.run(lambda: serve(parse_arguments(argv)), "Lower --max-seconds")
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
