#!/usr/bin/env python3
"""Fetch tcmalloc, for training on a CPU: micro-batches of ever new shapes make glibc's malloc slower all the time.

    python tools/prepare/allocator.py
    LD_PRELOAD=$PWD/assets/allocator/libtcmalloc_minimal.so.4 deepspeed listen_dist/train.py --config FILE

No root is needed, and what is there already is not fetched again. docs/learning.md has the figures.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from debian_packages import fetch_renamed
from recipe import run_main

from listen_dist.command_line import user_path

LIBRARY = "libtcmalloc_minimal.so.4"


def main() -> None:
    """Fetch the library and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, default=Path("assets/allocator"), help="folder for the library")
    out = parser.parse_args().out.resolve()
    fetch_renamed(("libtcmalloc-minimal4", "libtcmalloc-minimal4t64"), _library, out)
    print(out / LIBRARY)


def _library(name: str) -> str | None:
    """Return where the shared library goes: under the name that programs ask for, in the package a link."""
    return LIBRARY if re.fullmatch(rf"usr/lib/[^/]+/{re.escape(LIBRARY)}\.[\d.]+", name) else None


if __name__ == "__main__":
    run_main(main)
