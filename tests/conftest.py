"""What must happen before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, and DeepSpeed imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Read when the library is imported: no test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["tests.fixtures"]
