"""Where metrics go: a JSON-lines file always, MLflow if asked. Never blocks or ends a run."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from listen_dist.schema import Config

logger = logging.getLogger(__name__)


Outcome = Literal["FINISHED", "KILLED", "FAILED"]
"""How a run ended, in MLflow's words; KILLED is one that was stopped and can go on."""
RETRY = 30.0
"""Seconds between two tries to reach a store that is down."""
LONGEST = 6000
"""Characters that MLflow keeps of a parameter."""
Call = Callable[[Any, str], None]
"""Does something with an MLflow client and the id of a run."""


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
    """Sends metrics to MLflow from a thread of its own.

    A store that is down is said once and tried again; a call that it refuses is said and dropped, so that it holds no
    other up.

    Args:
        uri: tracking address, e.g. `sqlite:///runs/mlflow.db` or `http://host:5000`.
        experiment: its name.
        run_name: name of a new run.
        params: flat configuration, logged once; values too long for MLflow as artifacts.
        id_file: holds the run's id, so that a resumed run goes on in the same MLflow run.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, params: dict[str, str], id_file: Path) -> None:
        self._queue: queue.Queue[Call] = queue.Queue(maxsize=10_000)
        self._closing = threading.Event()
        self._outcome: Call | None = None
        self._refused: set[str] = set()
        self._thread = threading.Thread(target=self._work, args=(uri, experiment, run_name, params, id_file),
                                        daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._put(lambda client, run: client.log_batch(run, metrics=_metrics(metrics, now, step)))

    def log_file(self, path: Path) -> None:
        self._put(lambda client, run: client.log_artifact(run, str(path), artifact_path=path.parent.name))

    def close(self, outcome: Outcome, seconds: float = 20.0) -> None:
        """Send the outcome, then what is left, for at most so many seconds."""
        self._outcome = lambda client, run: client.set_terminated(run, outcome)
        self._closing.set()
        self._thread.join(seconds)

    def _put(self, call: Call) -> None:
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
        first: deque[Call] = deque()
        call: Call | None = None
        while True:
            try:
                if client is None:
                    from mlflow.tracking import MlflowClient  # takes seconds to import

                    client = MlflowClient(tracking_uri=uri)
                if not run:
                    run, is_new = _find_or_create_run(client, experiment, run_name, id_file, uri)
                    first.extend(_param_calls(params) if is_new else ())
                call = call or (first.popleft() if first else self._next())
                if call is None:
                    return
                call(client, run)
                call = None
                if down:
                    logger.info("MLflow at %s is back", uri)
                down = False
            except Exception as error:  # whatever the store does, training goes on
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                if call is not None and _refused(error):
                    self._say_refused(uri, said)
                    call = None
                    continue
                if not down:
                    logger.warning("MLflow at %s failed (%s); metrics go on in metrics.jsonl alone until it is back",
                                   uri, said)
                down = True
                if self._closing.is_set():  # that was the last try
                    return
                self._closing.wait(RETRY)

    def _next(self) -> Call | None:
        """The next call, waited for: the outcome first; None once the tracker is closed and nothing is left."""
        while True:
            if self._closing.is_set() and self._outcome is not None:
                outcome, self._outcome = self._outcome, None
                return outcome
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._closing.is_set() and self._outcome is None:
                    return None

    def _say_refused(self, uri: str, said: str) -> None:
        """Once for each reason, whatever name or number it holds."""
        if (kind := re.sub(r"'[^']*'|\d+", "", said)) not in self._refused:
            self._refused.add(kind)
            logger.warning("MLflow at %s refused what it was sent, which is left out there (%s)", uri, said)


def _refused(error: Exception) -> bool:
    """Whether trying again can't help: the store answered that the call is wrong, or there is nothing to send."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 404, 409, 413)
    return not isinstance(error, OSError) or isinstance(error, FileNotFoundError | PermissionError)


def _find_or_create_run(client: Any, experiment: str, run_name: str, id_file: Path, uri: str) -> tuple[str, bool]:
    """The run's id, and whether it is a new one."""
    from mlflow.exceptions import MlflowException

    if id_file.is_file():
        try:
            run_id = client.get_run(id_file.read_text(encoding="utf-8").strip()).info.run_id
            client.set_terminated(run_id, "RUNNING")
            return str(run_id), False
        except MlflowException as error:
            if not _refused(error):
                raise
            logger.warning("%s names an MLflow run that the store does not have; starting a new one", id_file)
    found = client.get_experiment_by_name(experiment)
    # Beside the store; MLflow's own default is a folder wherever the program happens to be started.
    files = (id_file.resolve().parent.parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifact_location=files)
    run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
    id_file.write_text(run_id, encoding="utf-8")  # at once: what fails from here on must not begin a second run
    return str(run_id), True


def legal_name(name: str) -> str:
    """A metric's or parameter's name with what MLflow refuses replaced: other characters, `//`, `..`, too many."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/.")[:250] or "_"


def _param_calls(params: Mapping[str, str]) -> list[Call]:
    """A call for each parameter, so that one that is refused takes no other along."""
    calls: list[Call] = []
    for key, value in params.items():
        name, shown = legal_name(key), value
        if len(value) > LONGEST:
            file = f"params/{name}.txt"
            shown = f"{value[: LONGEST - 300]} … (whole in {file})"
            calls.append(partial(_log_text, text=value, file=file))
        calls.append(partial(_log_param, name=name, value=shown))
    return calls


def _log_text(client: Any, run: str, text: str, file: str) -> None:
    client.log_text(run, text, file)


def _log_param(client: Any, run: str, name: str, value: str) -> None:
    client.log_param(run, name, value)


def _metrics(metrics: dict[str, float], now: int, step: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(legal_name(key), value, now, step) for key, value in metrics.items()]


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
