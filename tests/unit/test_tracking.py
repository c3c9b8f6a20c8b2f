"""Metrics reach their files and stores, and no store can hold a run up."""

from __future__ import annotations

import json
import logging
import math
import queue
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from listen_dist.tracking import JsonlTracker, MlflowTracker, Trackers, build_trackers, default_uri
from tests import launching, tiny

pytestmark = pytest.mark.timeout(600)


def test_jsonl_appends_a_line_a_call(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for first in (1, 3):  # the second tracker is the resumed run
        tracker = JsonlTracker(path)
        for step in (first, first + 1):
            tracker.log({"loss": step / 3}, step)
            assert json.loads(path.read_text().splitlines()[-1])["loss"] == step / 3  # readable at once
        tracker.close("FINISHED")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == {"step", "time", "loss"} for line in lines)


def test_a_line_cut_short_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    tracker = JsonlTracker(path)
    tracker.log({"loss": 1.5}, 2)
    tracker.close("FINISHED")
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["step"] == 1
    assert json.loads(lines[2]) | {"time": 0} == {"step": 2, "time": 0, "loss": 1.5}


def test_mlflow_store_is_written_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for steps in ((1, 2), (3,)):
        params = {"train.seed": "3", "long": "x" * 5900, "longer": "y" * 7000}
        tracker = MlflowTracker(uri, "tiny", "my-run", params, tmp_path / "id")
        for step in steps:
            tracker.log({"loss": 1 / step, "odd": math.nan if step == 2 else 1.0}, step)
        tracker.close("FINISHED", 60)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "my-run" and run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "3" and run.data.params["long"] == "x" * 5900
    assert run.data.params["longer"].endswith(" … (whole in params/longer.txt)")
    longer = Path(client.download_artifacts(run.info.run_id, "params/longer.txt"))
    assert longer.read_text(encoding="utf-8") == "y" * 7000
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_names_and_calls_that_mlflow_refuses_hold_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Braces, `=` and `//` are replaced; a file that is gone is said once; the run ends in its final state."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(uri, "tiny", "my-run", {"data.{a}": "1", "/x//y": "2"}, tmp_path / "id")
    tracker.log({"epochs_{a,b}/c@d=e": 1.0, "../up//x/": 2.0, "n" * 300: 3.0}, 1)
    for name in ("gone.html", "gone too.html"):
        tracker.log_file(tmp_path / name)
    tracker._put(lambda client, run: client.log_param(run, "data._a_", "another"))  # invalid, says the store
    tracker.log({"loss": 0.5}, 2)
    tracker.close("KILLED", 60)
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run((tmp_path / "id").read_text(encoding="utf-8"))
    assert run.info.status == "KILLED"
    assert run.data.metrics == {"epochs__a_b_/c_d_e": 1.0, "up/x": 2.0, "n" * 250: 3.0, "loss": 0.5}
    assert run.data.params == {"data._a_": "1", "x/y": "2"}
    said = [record.message for record in caplog.records if record.name == "listen_dist.tracking"]
    assert len(said) == 2 and all("refused what it was sent, which is left out there" in line for line in said), said


def test_a_full_queue_still_ends_the_run(tmp_path: Path) -> None:
    """More is waiting than the queue takes: the outcome is sent nevertheless."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(uri, "tiny", "my-run", {}, tmp_path / "id")
    tracker._queue = queue.Queue(maxsize=50)
    for step in range(100):
        tracker.log({"loss": 1.0}, step)
    tracker.close("FINISHED", 60)
    run = MlflowClient(tracking_uri=uri).get_run((tmp_path / "id").read_text(encoding="utf-8"))
    assert run.info.status == "FINISHED"


def test_an_unreachable_store_neither_blocks_nor_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    tracker = MlflowTracker("http://127.0.0.1:9", "tiny", "my-run", {}, tmp_path / "id")
    for step in range(20_000):  # more than the queue takes
        tracker.log({"loss": 1.0}, step)
    tracker.close("FINISHED", 2.0)
    assert time.monotonic() - start < 60
    assert not (tmp_path / "id").exists()


def test_a_broken_store_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be one " * 100)
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "tiny", "my-run", {}, tmp_path / "id")
    tracker.log({"loss": 1.0}, 1)
    tracker.close("FINISHED", 60)
    tracker.log({"loss": 1.0}, 2)
    said = [record.message for record in caplog.records if record.name == "listen_dist.tracking"]
    assert len(said) == 1 and "metrics go on in metrics.jsonl alone" in said[0]
    assert not tracker._thread.is_alive()
    assert (tmp_path / "mlflow.db").read_text().startswith("this is no database")


def test_a_server_that_comes_late_and_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A real `mlflow server`: down at the start, then there, then killed; nothing waits for it."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr("listen_dist.tracking.RETRY", 0.5)
    caplog.set_level(logging.INFO, "listen_dist.tracking")
    port, store = launching.free_port(), f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(f"http://127.0.0.1:{port}", "tiny", "my-run", {}, tmp_path / "id")
    tracker.log({"loss": 3.0}, 1)
    wait_for(lambda: "until it is back" in caplog.text)
    server = launching.start([launching.BIN / "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1",
                              "--port", str(port), "--workers", "1"], tmp_path / "server.log")
    try:
        wait_for(lambda: "is back" in caplog.text)
        tracker.log({"loss": 2.0}, 2)
        wait_for(lambda: tracker._queue.empty())
    finally:
        launching.kill_tree(server)
    start = time.monotonic()
    for step in range(3, 1000):
        tracker.log({"loss": 1.0}, step)
    assert time.monotonic() - start < 60, "logging waited for the server"
    tracker.close("FINISHED", 15)
    assert time.monotonic() - start < 120
    client = MlflowClient(tracking_uri=store)
    history = client.get_metric_history((tmp_path / "id").read_text(), "loss")
    assert [(metric.step, metric.value) for metric in history][:1] == [(1, 3.0)]
    assert len([record for record in caplog.records if "until it is back" in record.message]) == 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_config_chooses_trackers(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    config = tiny_world.config(f"run_dir={run_dir}")
    trackers = build_trackers(config, {})
    trackers.log({"loss": 1.0}, 1)
    trackers.close("FINISHED")
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl"]
    assert default_uri(config) == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    assert default_uri(tiny_world.config("tracking.uri=http://host:5000")) == "http://host:5000"
    Trackers().log({"loss": 1.0}, 1)
