"""The base of all errors that a user can mend."""

from __future__ import annotations

import io
import re
import sys

_DEATH = re.compile(r"DataLoader worker .*(killed|exited)")


class ListenError(Exception):
    """A mistake in a command, a config, a file or the surroundings; its text names the place and the cure.

    Programs print it as one line and exit with 2. Every other exception, a ValueError included, is a fault of
    ours: it keeps its traceback.
    """


class LoaderError(ListenError):
    """A loader process died; the message says how, and what to try."""

    @classmethod
    def of(cls, error: Exception) -> LoaderError | None:
        """What torch says when a loader process died, said in full; None for any other error.

        Torch may say so by a signal, wherever the program just is.
        """
        if isinstance(error, cls):
            return error
        if not _DEATH.search(str(error)):
            return None
        return cls(f"{error}\nA loader process died. Killed by signal 9 mostly means that memory ran out: lower "
                   "data.workers or data.batch_tokens")


def print_in_any_locale() -> None:
    """What stdout can't encode becomes `?`: a program must not end at the first such answer."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
