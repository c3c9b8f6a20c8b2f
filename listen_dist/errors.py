"""The base of all errors that a user can mend."""

from __future__ import annotations

import io
import sys


class ListenError(Exception):
    """A mistake in a command, a config, a file or the surroundings; its text names the place and the cure.

    Programs print it as one line and exit with 2. Every other exception, a ValueError included, is a fault of
    ours: it keeps its traceback.
    """


def print_in_any_locale() -> None:
    """What stdout can't encode becomes `?`: a program must not end at the first such answer."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
