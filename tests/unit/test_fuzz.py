"""A sample of the campaign's cases, and that it reports what is planted."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from listen_dist.data import decode
from tests import tiny
from tests.fuzz import campaign, world
from tests.fuzz.cases import KINDS, run_case
from tests.unit.planted_kind import PLANTED

SAMPLE = {"audio": range(12), "shards": range(6), "manifests": (0, 1, 2, 4, 5, *range(7, 15)), "tables": range(7),
          "configs": range(15), "page": range(4)}


@pytest.fixture(scope="module")
def root(tiny_world: tiny.Tiny, untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    world.use(root, world.World(tiny_world, untrained))
    return root


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_each_kind_is_used_or_refused(kind: str, root: Path) -> None:
    prepared = import_module(KINDS[kind]).prepare(root)
    results = [run_case(kind, KINDS[kind], prepared, seed, root / "case") for seed in SAMPLE[kind]]
    faults = [result for result in results if result.outcome == "fault"]
    assert not faults, f"{campaign.report(faults[0])}\n{faults[0].detail}"
    assert len({result.outcome for result in results}) > 1, "one outcome only: the inputs are too much alike"


@pytest.mark.usefixtures("one_thread")
def test_a_fault_in_decoding_is_reported_with_its_seed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(*_: object) -> None:
        raise ZeroDivisionError("planted")

    prepared = import_module(KINDS["audio"]).prepare(root)
    monkeypatch.setattr(decode, "_decode_any", divide)
    result = run_case("audio", KINDS["audio"], prepared, 3, root / "case")
    assert campaign.report(result).splitlines() == [
        "FAULT audio 3: ZeroDivisionError at listen_dist/data/decode.py:read_audio",
        "  python -m tests.fuzz --kind audio --case 3",
    ]
    assert "planted" in result.detail
    assert list((root / "case").iterdir()), "its input is left"


@pytest.mark.timeout(300)
def test_crashes_and_loops_are_reported_and_the_campaign_goes_on(tmp_path: Path) -> None:
    run = campaign.Campaign({"planted": "tests.unit.planted_kind"}, 7, tmp_path, tmp_path / "kept", cpu_seconds=1)
    results = list(run.run(240, most=len(PLANTED)))
    assert [result.outcome for result in results] == ["used", "refused", *["fault"] * 6, "used"]
    assert {fault.seed: fault.cause.split(" at ")[0] for fault in run.faults} == {
        7000002: "ZeroDivisionError", 7000003: "ListenError of 2 lines", 7000004: "Fault: not the same",
        7000005: "the process dies: SIGSEGV", 7000006: "hangs: 1 s of computing", 7000007: "SystemExit"}
    assert "planted_kind.py" in run.faults[4].detail, "where it loops"
    assert (tmp_path / "kept/planted-7000006/input").read_text(encoding="utf-8") == "loop"
    rows = campaign.table(run.summary()).splitlines()
    assert rows[1].split()[:2] == ["planted", "9"]
    assert "     1 times  planted 7000005: the process dies: SIGSEGV" in rows


def test_a_campaign_ends_when_it_is_told_to(tmp_path: Path) -> None:
    run = campaign.Campaign({"planted": "tests.unit.planted_kind"}, 7, tmp_path, tmp_path / "kept")
    for _ in run.run(240):
        run.stop()
    assert run.summary()["kinds"]["planted"]["inputs"] == 1
