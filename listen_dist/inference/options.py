"""Command-line options that the shell, the page and the export have in common; imports nothing heavy."""

from __future__ import annotations

import argparse
from os.path import expanduser


def add_frozen_models(parser: argparse.ArgumentParser) -> None:
    """Where the frozen models lie on this machine."""
    parser.add_argument("--llm", type=expanduser, metavar="DIR",
                        help="where the LLM lies here, if not where it was in training")
    parser.add_argument("--speech-encoder", type=expanduser, metavar="DIR", help="the same for the speech encoder")
    parser.add_argument("--audio-encoder", type=expanduser, metavar="FILE",
                        help="the same for the audio encoder, if it has one")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Device and dtype, and where the frozen models lie."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the LLM's weights (default: as trained)")
    add_frozen_models(parser)
