"""Two ranks with unlike work decode what one process decodes, whole or sharded; a kill costs one batch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from listen_dist.data.shards import ShardIndex
from listen_dist.evaluation.predictions import Prediction, read_predictions
from tests import forking, tiny

pytestmark = pytest.mark.timeout(1500)

WORKER = "tests.distributed.decoding_worker"
SMALL = "eval.batch_tokens=64"  # one clip a batch, so that seven go three to four
SCENARIOS = {
    "sharded": f"eval.llm=sharded;{SMALL}",
    "sharded-beams": f"eval.llm=sharded;eval.beams=3;eval.choices=generate;{SMALL}",
    "whole": f"eval.llm=whole;{SMALL}",
    "whole-beams": f"eval.llm=whole;eval.beams=3;eval.choices=generate;{SMALL}",
    "auto": f"eval.llm=auto;eval.limit=1;{SMALL}",
    "sharded-report": f"eval.llm=sharded;{SMALL}",
}


def notes(folder: Path, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"notes-{rank}.json").read_text()) for rank in range(world)]


def comparable(rows: list[Prediction]) -> list[tuple[Any, ...]]:
    return [(row.id, row.task, row.text, row.prompts, row.choices) for row in rows]


@pytest.fixture(scope="module")
def two_ranks(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    words = [f"{name}:{keys}" for name, keys in SCENARIOS.items()]
    forking.run(2, WORKER, [tiny_world.config_file, folder, *words], folder, 900)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, everything in one batch a task."""
    folder = tmp_path_factory.mktemp("one")
    forking.run(1, WORKER, [tiny_world.config_file, folder, "greedy:eval.batch_tokens=4096",
                                    "report:eval.batch_tokens=4096",
                                    "beams:eval.beams=3;eval.choices=generate;eval.batch_tokens=4096"], folder, 900)
    return folder


@pytest.mark.parametrize("name", ["sharded", "sharded-beams", "whole", "whole-beams"])
def test_two_ranks_with_unlike_work_answer_as_one_process(two_ranks: Path, alone: Path, tiny_world: tiny.Tiny,
                                                          name: str) -> None:
    ours = [read_predictions(two_ranks / name / f"predictions-{rank}.jsonl") for rank in range(2)]
    assert ours[0] == ours[1]
    theirs = read_predictions(alone / ("beams" if "beams" in name else "greedy") / "predictions-0.jsonl")
    assert comparable(ours[0]) == comparable(theirs) and len(theirs) == ShardIndex.load(tiny_world.test).samples == 7
    for row, other in zip(ours[0], theirs, strict=True):
        assert row.likelihoods == pytest.approx(other.likelihoods, abs=1e-4)
    assert any(row.likelihoods for row in theirs) == ("beams" not in name)
    by_rank = [rank["answered"] for rank in notes(two_ranks / name, 2)]
    whole = not name.startswith("sharded")
    assert [rank["whole"] for rank in notes(two_ranks / name, 2)] == [whole] * 2
    if whole:
        assert sorted(map(len, by_rank)) == [3, 4]
    else:
        assert len(by_rank[0]) == len(by_rank[1]) >= 4  # in step, with fillers
        assert {name for answered in by_rank for name in answered} == {row.id for row in theirs}


def test_the_planner_gathers_a_small_llm_and_one_sample_leaves_a_rank_idle(two_ranks: Path) -> None:
    by_rank = notes(two_ranks / "auto", 2)
    assert [rank["whole"] for rank in by_rank] == [True, True]
    assert sorted(len(rank["answered"]) for rank in by_rank) == [0, 1]


def test_a_sharded_llm_opens_the_same_pool(two_ranks: Path, alone: Path) -> None:
    ours, theirs = (json.loads((folder / "report/report.json").read_text())
                    for folder in (two_ranks / "sharded-report", alone / "report"))
    places = [[query["at"] for query in numbers["map"].pop("queries")] for numbers in (ours, theirs)]
    assert places[0] == [pytest.approx(place, abs=1e-5) for place in places[1]] and len(places[0]) == 7
    assert ours["vocabulary"] == theirs["vocabulary"] and ours["tasks"] == theirs["tasks"]


def test_a_killed_evaluation_goes_on_on_another_number_of_ranks(tiny_world: tiny.Tiny, alone: Path,
                                                                tmp_path: Path) -> None:
    words = [tiny_world.config_file, tmp_path, f"killed:eval.llm=whole;{SMALL}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_AFTER", "2")
        with pytest.raises(AssertionError):
            forking.run(2, WORKER, words, tmp_path, 900)
    partial = tmp_path / "killed/partial"
    kept = [json.loads(line)["id"] for path in partial.glob("rank-*.jsonl") for line in path.read_text().splitlines()]
    assert 2 <= len(kept) <= 4 and not list((tmp_path / "killed").glob("predictions*"))
    with (partial / "rank-1.jsonl").open("a") as file:
        file.write('{"set": "half a li')
    forking.run(1, WORKER, words, tmp_path, 900)
    found = read_predictions(tmp_path / "killed/predictions-0.jsonl")
    assert comparable(found) == comparable(read_predictions(alone / "greedy/predictions-0.jsonl"))
    (one,) = notes(tmp_path / "killed", 1)
    assert Counter(one["answered"]) + Counter(kept) == Counter(row.id for row in found)
