"""The pool's report of a real run, opened in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from listen_dist import evaluate
from listen_dist.evaluation import figures, report
from tests.browser import open_tab
from tests.fixtures import TrainedRun

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The trained tiny run, evaluated with a report, and reported on once more."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(trained.folder, folder)
    before = dict(os.environ)
    words = ["--config", str(folder / "config.yaml"), "--out", str(folder), f"run_dir={folder}",
             "parallel.llm=replicated", "eval.report=true", "tracking.mlflow=true"]
    assert evaluate.main(words) == 0
    assert (folder / "report/report.html").is_file()
    assert MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}").list_artifacts(
        (folder / "mlflow_run_id").read_text(), "report")
    shutil.copy(folder / "report/report.json", folder / "first.json")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("mlflow: false", "mlflow: true").replace(str(trained.folder),
                                                                                          str(folder)))
    assert report.main(["--run", str(folder), "--clips", "2"]) == 0
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def numbers(run: Path) -> dict[str, Any]:
    return json.loads((run / "report/report.json").read_text())


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Any]:
    with open_tab() as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((run / "report/report.html").as_uri())
        yield tab
        assert all(url.startswith(("file:", "data:")) for url in asked), "the page is not self-contained"


def look_up(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def test_figures_are_drawn(page: Any) -> None:
    """Decoded and painted: pixels of many colours, in the lower half too."""
    sizes = page.evaluate("""[...document.images].map(image => {
        const canvas = document.createElement('canvas'), width = image.naturalWidth, height = image.naturalHeight;
        canvas.width = width; canvas.height = height;
        const paint = canvas.getContext('2d');
        paint.drawImage(image, 0, 0);
        const pixels = new Uint32Array(paint.getImageData(0, height / 2, width, height / 2).data.buffer);
        return [image.id, width, height, new Set(pixels).size]; })""")
    assert [name for name, *_ in sizes] == ["usage", "overlap", "training", "map"]
    assert all(width > 300 and height > 150 and colours > 50 for _, width, height, colours in sizes), sizes


def test_numbers_on_the_page_equal_the_json(page: Any, numbers: dict[str, Any]) -> None:
    shown = page.evaluate("[...document.querySelectorAll('[data-path]')].map(e => [e.dataset.path, e.innerText])")
    assert len(shown) > 80 and {"step", "k", "all/effective", "tasks/asr/effective"} <= {path for path, _ in shown}
    for path, text in shown:
        digits = len(text.partition(".")[2])
        assert float(text) == round(float(look_up(numbers, path)), digits), path
    assert json.loads(page.inner_text("#data", timeout=1000) or page.evaluate(
        "document.getElementById('data').textContent")) == numbers
    assert page.inner_text("#verdict") == numbers["verdict"]["words"]


def test_clips_can_be_played(page: Any, numbers: dict[str, Any]) -> None:
    durations = page.evaluate("""Promise.all([...document.querySelectorAll('audio')].map(a => new Promise(done => {
        a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1);
        a.preload = 'metadata'; a.load(); })))""")
    assert durations == pytest.approx([clip["seconds"] for clip in numbers["clips"]], abs=0.01)
    assert len(durations) == 5  # two each of asr and speech_qa, the one of language_id


def test_the_json_is_what_the_predictions_say(run: Path, numbers: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert numbers["all"]["clips"] == len(rows) == 7 and numbers["k"] == 4 and numbers["prompts"] == 10
    for task, summary in numbers["tasks"].items():
        mine = [row for row in rows if row["task"] == task]
        usage = [sum(n in row["prompts"] for row in mine) / len(mine) for n in range(10)]
        assert summary["usage"] == pytest.approx(usage) and sum(usage) == pytest.approx(4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert numbers["training"]["steps"] == list(range(1, 13))
    assert numbers["training"]["effective"]["all"] == [line["effective_prompts"] for line in lines]
    assert numbers["training"]["unused"]["asr"] == [line.get("unused_prompts_asr") for line in lines]
    assert set(numbers["training"]["effective"]) == {"all", "asr", "caption", "language_id", "speech_qa"}
    by_id = {row["id"]: row for row in rows}
    for clip in numbers["clips"]:
        assert [entry["prompt"] for entry in clip["prompts"]] == by_id[clip["id"]]["prompts"]
    assert len(numbers["map"]["keys"]) == 10 and len(numbers["map"]["queries"]) == 7
    assert [len(row) for row in numbers["vocabulary"]] == [5] * 10


def test_a_report_by_itself_is_that_of_the_evaluation(run: Path, numbers: dict[str, Any]) -> None:
    first = json.loads((run / "first.json").read_text())
    assert len(first.pop("clips")) == 6  # three a task where there are so many
    assert first == {key: value for key, value in numbers.items() if key != "clips"}


@pytest.mark.parametrize("missing", [{"map": None}, {"training": {"steps": [], "effective": {}, "unused": {}}},
                                     {"overlap": {"tasks": ["asr"], "jaccard": [[0.5]]}}])
def test_a_figure_that_cannot_be_drawn_is_left_out(numbers: dict[str, Any], missing: dict[str, Any]) -> None:
    """As of a pool without keys, a run without a log, a split of one task."""
    data = {**numbers, **missing, "clips": []}
    (name,) = missing
    assert f'id="{name}"' in report.render(numbers | {"clips": []}, figures.draw_all(numbers))
    assert f'id="{name}"' not in report.render(data, figures.draw_all(data))


def test_files_lie_beside_and_in_mlflow(run: Path) -> None:
    names = {"map.png", "overlap.png", "report.html", "report.json", "training.png", "usage.png"}
    assert {path.name for path in (run / "report").iterdir()} == names
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    logged = client.list_artifacts((run / "mlflow_run_id").read_text(), "report")
    assert {Path(entry.path).name for entry in logged} == names


@pytest.mark.parametrize("damage, message", [
    (lambda run: (run / "results.json").unlink(), "results.json: not found; run evaluate.py"),
    (lambda run: (run / "predictions.jsonl").write_text(""), "no sample in it"),
    (lambda run: (run / "predictions.jsonl").write_text(
        "".join((run / "predictions.jsonl").read_text().splitlines(True)[1:])), "different evaluations"),
    (lambda run: (run / "predictions.jsonl").write_text(
        (run / "predictions.jsonl").read_text().replace("test-00", "test-99")), "'test-99' and perhaps others"),
    (lambda run: (run / "results.json").write_text(
        (run / "results.json").read_text().replace('/test": "', '/test": "0')), "not the shards"),
])
def test_files_that_do_not_belong_together_are_refused(run: Path, tmp_path: Path, damage: Any, message: str,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder)
    assert report.main(["--run", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # a progress bar may stand before it
    assert error.startswith("error: ") and message in error
