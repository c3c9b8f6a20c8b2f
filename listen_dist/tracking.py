"""Where metrics go: a JSON-lines file always, MLflow if asked. Never blocks or ends a run."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from listen_dist.schema import Config

logger = logging.getLogger(__name__)


Outcome = Literal["FINISHED", "KILLED", "FAILED"]
"""How a run ended, in MLflow's words; KILLED is one that was stopped and can go on."""
RETRY = 30.0
"""Seconds between two tries to reach a store that is down."""


class Tracker(Protocol):
    """Takes what a run reports."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def log_file(self, path: Path) -> None: ...

    def close(self, outcome: Outcome) -> None: ...


class JsonlTracker:
    """One JSON line a call in `path`; appends, so that a resumed run goes on in the same file.

    What a full disk refuses is kept and written with the next line that fits.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.is_file() else b""
        self._path = path
        self._file = path.open("ab", buffering=0)
        # A line that was cut short by a kill must not swallow the next one.
        self._pending = b"\n" if before and not before.endswith(b"\n") else b""
        self._refused = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._pending += json.dumps({"step": step, "time": round(time.time(), 3), **metrics}).encode() + b"\n"
        size = self._path.stat().st_size
        try:
            left = memoryview(self._pending)
            while left:
                left = left[self._file.write(left):]
            self._pending, self._refused = b"", False
        except OSError as error:
            self._file.truncate(size)  # no half line
            if not self._refused:
                logger.warning("%s: %s; the lines are kept until there is room", self._path, error)
            self._refused = True

    def log_file(self, path: Path) -> None:
        """Nothing to do: it lies in the run folder."""

    def close(self, outcome: Outcome) -> None:
        self._file.close()


class MlflowTracker:
    """Sends metrics to MLflow from a thread of its own; a store that is down is said once and tried again.

    Args:
        uri: tracking address, e.g. `sqlite:///runs/mlflow.db` or `http://host:5000`.
        experiment: its name.
        run_name: name of a new run.
        params: flat configuration, logged once.
        id_file: holds the run's id, so that a resumed run goes on in the same MLflow run.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, params: dict[str, str], id_file: Path) -> None:
        self._queue: queue.Queue[Callable[[Any, str], None] | None] = queue.Queue(maxsize=10_000)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(uri, experiment, run_name, params, id_file),
                                        daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._put(lambda client, run: client.log_batch(run, metrics=_metrics(metrics, now, step)))

    def log_file(self, path: Path) -> None:
        self._put(lambda client, run: client.log_artifact(run, str(path), artifact_path=path.parent.name))

    def close(self, outcome: Outcome, seconds: float = 20.0) -> None:
        """Send what is left, for at most so many seconds."""
        self._put(lambda client, run: client.set_terminated(run, outcome))
        self._put(None)
        self._closing.set()
        self._thread.join(seconds)

    def _put(self, call: Callable[[Any, str], None] | None) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:  # the store is far behind; the JSON-lines file has everything
            pass

    def _work(self, uri: str, experiment: str, run_name: str, params: dict[str, str], id_file: Path) -> None:
        for noisy in ("alembic", "urllib3.connectionpool"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        # MLflow's own defaults let one call hang for minutes; this thread tries again by itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        client, run, down = None, "", False
        call: Callable[[Any, str], None] | None = None
        while True:
            try:
                if client is None:
                    from mlflow.tracking import MlflowClient  # takes seconds to import

                    client = MlflowClient(tracking_uri=uri)
                run = run or _find_or_create_run(client, experiment, run_name, params, id_file, uri)
                call = call or self._queue.get()
                if call is None:
                    return
                call(client, run)
                call = None
                if down:
                    logger.info("MLflow at %s is back", uri)
                down = False
            except Exception as error:  # whatever the store does, training goes on
                if not down:
                    logger.warning("MLflow at %s failed (%s); metrics go on in metrics.jsonl alone until it is back",
                                   uri, str(error).splitlines()[0] if str(error) else type(error).__name__)
                down = True
                if self._closing.is_set():  # that was the last try
                    return
                self._closing.wait(RETRY)


def _find_or_create_run(client: Any, experiment: str, run_name: str, params: dict[str, str], id_file: Path, uri: str,
                        ) -> str:
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    if id_file.is_file():
        try:
            run_id = client.get_run(id_file.read_text(encoding="utf-8").strip()).info.run_id
            client.set_terminated(run_id, "RUNNING")
            return str(run_id)
        except MlflowException:
            logger.warning("%s names an MLflow run that the store does not have; starting a new one", id_file)
    found = client.get_experiment_by_name(experiment)
    # Beside the store; MLflow's own default is a folder wherever the program happens to be started.
    files = (id_file.resolve().parent.parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifact_location=files)
    run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
    client.log_batch(run_id, params=[Param(key, value[:500]) for key, value in params.items()])
    id_file.write_text(run_id, encoding="utf-8")
    return str(run_id)


def _metrics(metrics: dict[str, float], now: int, step: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(key, value, now, step) for key, value in metrics.items()]


class Trackers:
    """Several trackers as one; none on ranks that do not report."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def log(self, metrics: dict[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def log_file(self, path: Path) -> None:
        for tracker in self._trackers:
            tracker.log_file(path)

    def close(self, outcome: Outcome) -> None:
        for tracker in self._trackers:
            tracker.close(outcome)


def default_uri(config: Config) -> str:
    """The MLflow address of a config: its own, or the SQLite file beside the run folder."""
    return config.tracking.uri or f"sqlite:///{Path(config.run_dir).resolve().parent / 'mlflow.db'}"


def build_trackers(config: Config, params: dict[str, str]) -> Trackers:
    """The trackers that a config asks for; call on rank 0 only."""
    run_dir = Path(config.run_dir)
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl")]
    if config.tracking.mlflow:
        trackers.append(MlflowTracker(default_uri(config), config.tracking.experiment, run_dir.name, params,
                                      run_dir / "mlflow_run_id"))
    return Trackers(trackers)


def log_files(config: Config, run_dir: Path, paths: Sequence[Path]) -> None:
    """Add files to the MLflow run of a run folder, where `tracking.mlflow` is on; for programs after training."""
    if config.tracking.mlflow:
        tracker = MlflowTracker(default_uri(config), config.tracking.experiment, run_dir.name, {},
                                run_dir / "mlflow_run_id")
        for path in paths:
            tracker.log_file(path)
        tracker.close("FINISHED", seconds=60.0)
