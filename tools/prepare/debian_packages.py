"""Fetch Debian packages without root and take files out of them: what the recipes here share.

`apt-get download` asks the mirrors that this machine is set up for, so no host stands in our code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from recipe import PrepareError
from tqdm import tqdm

Rename = Callable[[str], str | None]
"""Path in the package (`usr/share/…`) → path under the recordings folder, or None to leave the file out."""


def fetch_files(packages: dict[str, Rename], folder: Path) -> None:
    """Take files out of packages into `folder`; a package whose files are all there already is skipped.

    Also keeps each package's copyright file under `folder/licenses` and lists them in `folder/LICENSES.txt`.

    Raises:
        PrepareError: no apt here, the network or a package is missing, or a package holds other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not _is_complete(folder, name)]
    if missing:
        with tempfile.TemporaryDirectory(prefix="listen-debian-") as temporary:
            archives = _download(missing, Path(temporary))
            for name in tqdm(missing, desc="unpack", unit="package", disable=None):
                _unpack(archives[name], name, packages[name], folder)
    _write_licenses(folder)


def fetch_renamed(names: Sequence[str], rename: Rename, folder: Path) -> None:
    """`fetch_files` of one package that has another name on another release (`…t64` since Debian 13, Ubuntu 24.04).

    Raises:
        PrepareError: no apt here, or none of the names can be had; it is about the last one.
    """
    there = [name for name in names if _is_complete(folder, name)]
    for name in there or names:
        try:
            return fetch_files({name: rename}, folder)
        except PrepareError:
            if name == names[-1]:
                raise


def _download(packages: list[str], work: Path) -> dict[str, Path]:
    print(f"download {len(packages)} Debian packages: {' '.join(packages)}", flush=True)
    try:
        result = _apt(["download", *packages], work)
        if result.returncode:
            private = _private_lists(work)
            result = _apt([*private, "download", *packages], work)
    except FileNotFoundError:
        raise PrepareError(
            "apt-get not found: this recipe needs Debian or Ubuntu (try a container)"
        ) from None
    if result.returncode:
        raise PrepareError(f"apt-get could not download {' '.join(packages)}:\n{result.stderr.strip()}")
    archives = {path.name.split("_")[0]: path for path in work.glob("*.deb")}
    absent = [name for name in packages if name not in archives]
    if absent:
        raise PrepareError(f"apt-get gave no archive of {' '.join(absent)}")
    return archives


def _private_lists(work: Path) -> list[str]:
    """Fetch package lists into a folder of our own (the machine's may be empty, and need root); apt options."""
    print("no package lists on this machine: fetching them (no root needed)", flush=True)
    for part in ("lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
    result = _apt([*options, "update"], work)
    if result.returncode:
        raise PrepareError(f"apt-get update failed; is there a network?\n{result.stderr.strip()}")
    return options


def _apt(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    # As root apt would otherwise switch to a user who can't write into our folder.
    options = ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]
    command = ["apt-get", "-q", *options, *arguments]
    return subprocess.run(
        command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )


def _unpack(archive: Path, package: str, rename: Rename, folder: Path) -> None:
    """Stream the package's tar and write the wanted files; the stamp that says "complete" comes last."""
    files: dict[str, int] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = str(PurePosixPath(member.name))
            is_license = name == f"usr/share/doc/{package}/copyright"
            target = f"licenses/{package}.txt" if is_license else rename(name)
            content = tar.extractfile(member) if target and member.isfile() else None
            if target and content:
                files[target] = _write_file(folder, target, content.read())
    if process.returncode:
        raise PrepareError(f"dpkg-deb could not read {archive.name} (exit {process.returncode})")
    if len(files) < 2:
        raise PrepareError(f"{package} holds none of the files this recipe expects; has its layout changed?")
    _write_file(folder, f"licenses/.{package}.json", json.dumps(files, indent=1).encode())


def _write_file(folder: Path, name: str, content: bytes) -> int:
    path = folder / name
    if ".." in PurePosixPath(name).parts or os.path.isabs(name):
        raise PrepareError(f"unsafe name in package: {name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return len(content)


def _is_complete(folder: Path, package: str) -> bool:
    """Tell whether all files that the package's stamp lists are there in their full size."""
    try:
        files = json.loads((folder / f"licenses/.{package}.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def _write_licenses(folder: Path) -> None:
    """List every package's licences, short, and where its full copyright file lies."""
    lines = ["What lies here comes from these Debian packages. Full texts: licenses/<package>.txt", ""]
    for path in sorted((folder / "licenses").glob("*.txt")):
        text = path.read_text(errors="replace", encoding="utf-8")
        names = re.findall(
            r"(?:^\s*License: *|/common-licenses/)((?:CC|L?GPL|MIT)[\w.+-]*)", text, re.MULTILINE
        )
        shown = ", ".join(sorted(set(names))) or "see the full text"
        lines.append(f"{path.stem}: {shown}")
    (folder / "LICENSES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
