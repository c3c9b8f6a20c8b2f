"""tools/prepare/allocator.py on a package built here: taken under either of its names, and only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/prepare"))

import allocator
from debian_packages import fetch_renamed
from recipe import PrepareError

RENAMED = "libtcmalloc-minimal4t64"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release that has the package under its later name: apt-get stands in, dpkg-deb is the real one."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    tree = tmp_path / "tree"
    for name in ("DEBIAN/control", f"usr/share/doc/{RENAMED}/copyright", "usr/lib/x/libtcmalloc_minimal.so.4.5.16"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"Package: {RENAMED}\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: a\n")
    (tree / "usr/lib/x/libtcmalloc_minimal.so.4").symlink_to("libtcmalloc_minimal.so.4.5.16")
    archive = tmp_path / f"{RENAMED}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, archive], check=True, capture_output=True)
    log, apt = tmp_path / "asked", tmp_path / "bin/apt-get"
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\nfor name; do :; done\necho "$name" >> {log}\n'
                   f'case $name in {RENAMED}) cp {archive} . ;; update) ;; *) echo "no $name" >&2; exit 1 ;; esac\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    return log


def test_the_later_name_is_tried_and_what_is_there_is_not_asked_for(
        asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["allocator.py", "--out", str(tmp_path / "out")])
    allocator.main()
    library = tmp_path / "out/libtcmalloc_minimal.so.4"
    assert library.is_file() and not library.is_symlink()
    assert capsys.readouterr().out.endswith(f"{library}\n")
    before = asked.read_text(encoding="utf-8").splitlines()
    assert before == ["libtcmalloc-minimal4", "update", "libtcmalloc-minimal4", RENAMED]
    allocator.main()
    assert asked.read_text(encoding="utf-8").splitlines() == before


def test_no_such_package_names_the_last(asked: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="no other"):
        fetch_renamed(["one", "other"], allocator._library, tmp_path / "out")
