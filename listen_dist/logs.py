"""Logging from rank 0 only (warnings and errors from all), and progress bars."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from listen_dist import dist

T = TypeVar("T")


class _RankFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = dist.rank()
        return dist.is_main() or record.levelno >= logging.WARNING


def setup(log_file: Path | None = None) -> None:
    """Send the package's log lines to stderr, and rank 0's also to `log_file`."""
    logger = logging.getLogger("listen_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and dist.is_main():
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
    logging.raiseExceptions = False  # a full disk costs log lines; it must not fill stderr with tracebacks
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s [rank %(rank)s] %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankFilter())
        logger.addHandler(handler)
    # These libraries announce every adjustment at warning level; theirs and ours would mix.
    for noisy in ("DeepSpeed", "deepspeed", "transformers", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def append_lines(file: Path, lines: Sequence[str]) -> None:
    """Add lines to a file; a full disk costs the lines, not the run."""
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
    except OSError as error:
        logging.getLogger(__name__).warning("%d lines could not be added to %s: %s", len(lines), file, error)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """A progress bar on rank 0; on a log file instead of a terminal, one line in ten seconds."""
    bar = tqdm(items, desc=what, total=total, disable=not dist.is_main(), dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 10.0)
    return iter(bar)


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `02:03`."""
    return time.strftime("%-H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(max(0.0, seconds)))
