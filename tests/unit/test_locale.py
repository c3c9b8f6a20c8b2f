"""What the package writes and reads as text doesn't depend on the locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

OTHER_FORMATS = {"av", "fsspec", "os", "soundfile", "tarfile", "wave"}
"""Modules whose `open` takes no encoding."""


def reads_text_by_the_locale(call: ast.Call) -> bool:
    """Ruff knows `open(path)`, but not that some name holds a Path."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named:
        return False
    if isinstance(text := named.get("text"), ast.Constant) and text.value is True:  # of a subprocess
        return True
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "open" and not (isinstance(call.func.value, ast.Name) and call.func.value.id in OTHER_FORMATS):
        mode = named.get("mode") or (call.args[0] if call.args else ast.Constant("r"))
        return isinstance(mode, ast.Constant) and "b" not in str(mode.value)
    positional = {"read_text": 1, "write_text": 2}.get(call.func.attr)
    return positional is not None and len(call.args) < positional


@pytest.mark.parametrize("folder", ["listen_dist", "tools"])
def test_text_files_are_utf_8(folder: str) -> None:
    found = [f"{path.relative_to(ROOT)}:{call.lineno}" for path in sorted(Path(ROOT / folder).rglob("*.py"))
             for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(call, ast.Call) and reads_text_by_the_locale(call)]
    assert not found


def test_what_stdout_cannot_encode_ends_nothing() -> None:
    code = "from listen_dist.errors import print_in_any_locale as f; f(); print('caf\\u00e9 \\u2026 \\udce9')"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_only, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == b"caf? ? ?\n", done.stderr
