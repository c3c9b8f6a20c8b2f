"""What must happen before any test module is imported."""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, and DeepSpeed imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Read when the library is imported: no test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C; `nohup` SIGHUP.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

pytest_plugins = ["tests.fixtures"]
