"""Stop on request: finish the step, save, and leave with a code that means "start me again".

A first SIGTERM, SIGUSR1, SIGUSR2, SIGINT (Ctrl-C) or SIGHUP (a closed terminal) is only noted; the loop asks for it
once a step. A second one leaves at once. Launchers repeat a signal and turn one into another within moments, so what
comes within GRACE seconds of the first counts as the same request. A signal that the surroundings ignore (`nohup`)
stays ignored.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from listen_dist.exits import RESUMABLE

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
GRACE = 3.0


def leave_when_asked() -> None:
    """Until a StopRequest is open a signal leaves at once: there is nothing to save yet."""
    _handle(lambda number, frame: os._exit(RESUMABLE))


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of all signals that aren't ignored; the handlers before."""
    return {number: signal.signal(number, handler) for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN}


class StopRequest:
    """Takes the signals while it is open; the main thread alone may open it.

    A thread reads them, because Python runs a signal's handler only between two bytecodes of the
    main thread, which may hang in a collective for long.
    """

    def __init__(self) -> None:
        self.asked = ""
        """The name of the first signal; empty while there was none."""
        self.can_wait = False
        """Set by the loop, which looks at `asked`. Before that there is nothing to save: a signal leaves at once."""
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = _handle(_noted)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread

    def _watch(self) -> None:
        with self._reader:
            while received := self._reader.recv(1):
                if received[0] in SIGNALS:
                    self._take(signal.Signals(received[0]).name)

    def _take(self, name: str) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = name, now
            if self.can_wait:
                logger.warning("%s: finishing this step, then saving and leaving with code %d (a second signal "
                               "leaves at once)", name, RESUMABLE)
        if not self.can_wait or now - self._since > GRACE:
            logger.warning("%s: leaving at once with code %d; the last checkpoint is valid", name, RESUMABLE)
            os._exit(RESUMABLE)


def _noted(number: int, frame: FrameType | None) -> None:
    """Python needs a handler to be there; the thread does the work."""
