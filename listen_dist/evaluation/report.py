"""Open the pool of an evaluated run: a self-contained HTML page, its figures, and the raw numbers.

    python -m listen_dist.evaluation.report --run runs/quickstart

Reads what evaluate.py left in the run folder (results.json, predictions.jsonl) and the checkpoint that
results.json names; writes RUN/report/report.html, report.json and PNG files, and logs them to the run's
MLflow run where `tracking.mlflow` is on. One process; the LLM serves for its embeddings alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import soundfile
import torch

from listen_dist import config as configuration
from listen_dist import dist, logs, tracking
from listen_dist.data.decode import AudioError
from listen_dist.data.loader import BatchReader
from listen_dist.data.schedule import SampleRef
from listen_dist.data.shards import ShardError
from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.evaluation import figures, prompts
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import SAMPLE_RATE

TOKENS = 5
"""Nearest vocabulary entries shown for a value."""
BATCH = 16
"""Clips of one pass for queries."""


class ReportError(RuntimeError):
    """A run that cannot be reported on; the first line names the file and the cure."""


@dataclass(frozen=True)
class Evaluated:
    """A run folder after evaluate.py."""

    folder: Path
    config: Config
    results: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def split(self) -> str:
        return str(self.results["split"])


def read_run(folder: Path) -> Evaluated:
    """Read a run folder and check that its files belong together.

    Raises:
        ReportError: a file is missing or damaged, or predictions and results differ in their samples.
    """
    files = {name: folder / name for name in ("config.yaml", "results.json", "predictions.jsonl")}
    for name, file in files.items():
        if not file.is_file():
            cure = "train first" if name == "config.yaml" else f"run evaluate.py --config {files['config.yaml']} first"
            raise ReportError(f"{file}: not found; {cure}")
    config = configuration.load(files["config.yaml"])
    try:
        results = json.loads(files["results.json"].read_text())
        predictions = [json.loads(line) for line in files["predictions.jsonl"].read_text().splitlines()]
        counts = {task: entry["samples"] for task, entry in results["tasks"].items()}
        found = dict(Counter(row["task"] for row in predictions))
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{folder}: results.json or predictions.jsonl is damaged ({error}); "
                          "evaluate again") from error
    if not predictions:
        raise ReportError(f"{files['predictions.jsonl']}: no sample in it; nothing to report on")
    if counts != found:
        raise ReportError(f"{files['predictions.jsonl']}: holds {found} samples, results.json {counts}: "
                          "they come from different evaluations; evaluate again")
    if config.pool.selection == "none":
        raise ReportError(f"{files['config.yaml']}: pool.selection = none: there is no pool to open")
    return Evaluated(folder, config, results, predictions)


def open_split(parts: Parts, run: Evaluated) -> tuple[BatchReader, dict[str, SampleRef]]:
    """The evaluated split, and where each predicted sample lies in it.

    Raises:
        ReportError: the shards are not those that were evaluated.
    """
    reader = parts.reader(getattr(run.config.data, run.split), with_targets=False)
    places = {}
    for number, index in enumerate(reader.indexes):
        expected = run.results["data_fingerprints"].get(str(index.folder))
        if expected != index.fingerprint:
            raise ReportError(f"{index.folder}: not the shards that results.json was made from; evaluate again")
        for shard, entry in enumerate(index.shards):
            names = index.shard_table(shard).ids
            places.update({names[row]: SampleRef(number, shard, row) for row in range(entry.samples)})
    missing = [row["id"] for row in run.predictions if row["id"] not in places]
    if missing:
        raise ReportError(f"{run.folder / 'predictions.jsonl'}: {missing[0]!r} and perhaps others are not in the "
                          f"{run.split} split; evaluate again")
    return reader, places


def gather(run: Evaluated, parts: Parts, per_task: int, mapped: int) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        per_task: single clips shown for each task.
        mapped: queries put on the map for each task.
    """
    pool, rows = run.config.pool, run.predictions
    values = parts.model.pool.table().detach().numpy()
    tasks = [row["task"] for row in rows]
    choices = prompts.Choices(tasks, [tuple(row["prompts"]) for row in rows], [tuple(row["scores"]) for row in rows],
                              len(values), weighted=pool.selection == "attention")
    table = choices.membership()
    names, overlap = prompts.jaccard(table, tasks)
    everything = prompts.usage_summary(table)
    k = parts.model.pool.prompt_tokens(int(run.results["k"]))
    state, words = prompts.verdict(pool.selection, k, everything, overlap)
    reader, places = open_split(parts, run)
    return {
        "format_version": 1, "run": run.folder.name, "checkpoint": run.results["checkpoint"],
        "step": run.results["step"], "split": run.split, "selection": pool.selection, "prompts": len(values), "k": k,
        "weighted": choices.weighted, "verdict": {"state": state, "words": words}, "all": everything,
        "tasks": {name: prompts.usage_summary(table[[task == name for task in tasks]]) for name in names},
        "overlap": {"tasks": names, "jaccard": [[None if np.isnan(x) else float(x) for x in row] for row in overlap]},
        "training": training_curves(run.folder / "metrics.jsonl"),
        "map": key_map(parts, reader, [(row, places[row["id"]]) for row in first_of_each(rows, mapped)]),
        "vocabulary": vocabulary(parts, values),
        "clips": [clip(reader, row, places[row["id"]], run.config) for row in first_of_each(rows, per_task)],
    }


def training_curves(file: Path) -> dict[str, Any]:
    """Steps, and the effective number of prompts at each: of all clips and of each task (None: not seen)."""
    lines: dict[int, dict[str, float]] = {}
    for text in file.read_text().splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        if "effective_prompts" in line:
            lines[line["step"]] = line  # a step done again after a kill: the last counts
    steps = sorted(lines)
    key = "effective_prompts"
    tasks = sorted({name.removeprefix(f"{key}_") for line in lines.values() for name in line
                    if name.startswith(f"{key}_")})
    columns = {"all": key, **{task: f"{key}_{task}" for task in tasks}}
    effective = {name: [lines[step].get(column) for step in steps] for name, column in columns.items()}
    return {"steps": steps, "effective": effective, "unused": [lines[step].get("unused_prompts") for step in steps]}


@torch.no_grad()
def key_map(parts: Parts, reader: BatchReader, placed: Sequence[tuple[dict[str, Any], SampleRef]],
            ) -> dict[str, Any] | None:
    """Keys and the queries of some clips on two principal axes; None where there are no keys."""
    keys = getattr(parts.model.pool, "keys", None)
    if keys is None:
        return None
    queries: dict[str, np.ndarray] = {}
    for start in logs.progress(range(0, len(placed), BATCH), "queries"):
        batch = reader[[place for _, place in placed[start : start + BATCH]]]
        if len(batch):
            queries |= dict(zip(batch.ids, parts.model.queries(batch).numpy(), strict=True))
    points, variance = prompts.pca(np.concatenate([keys.numpy(), np.stack(list(queries.values()))]))
    at = dict(zip(queries, points[len(keys):].tolist(), strict=True))
    return {"keys": points[: len(keys)].tolist(), "variance": variance,
            "queries": [{"id": row["id"], "task": row["task"], "at": at[row["id"]]} for row, _ in placed
                        if row["id"] in at]}


@torch.no_grad()
def vocabulary(parts: Parts, values: np.ndarray) -> list[list[dict[str, Any]]]:
    """The vocabulary entries nearest to each value, best first, with line ends and the like spelt out."""
    size = parts.model.llm.config.vocab_size
    embeddings = parts.model.llm.get_input_embeddings()(torch.arange(size)).float().numpy()
    return [[{"token": json.dumps(parts.text.piece(token), ensure_ascii=False)[1:-1], "cosine": cosine}
             for token, cosine in row]
            for row in prompts.nearest_tokens(values, embeddings, TOKENS)]


def first_of_each(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first so many rows of each task, in their order."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row["task"]] = seen.get(row["task"], 0) + 1
        if seen[row["task"]] <= count:
            kept.append(row)
    return sorted(kept, key=lambda row: row["task"])


def clip(reader: BatchReader, row: dict[str, Any], place: SampleRef, config: Config) -> dict[str, Any]:
    """One clip: what was asked and answered, the prompts with scores, and the audio as a FLAC data address."""
    sample = reader.indexes[place.set].read_sample(place.shard, place.row, "audio", config.data.max_seconds)
    assert sample.waveform is not None
    file = io.BytesIO()
    soundfile.write(file, sample.waveform, SAMPLE_RATE, format="FLAC")
    order = np.argsort(-np.array(row["scores"]), kind="stable").tolist()
    return {"id": row["id"], "task": row["task"], "question": sample.record.question or sample.record.instruction,
            "text": row["text"], "answers": list(row["answers"]), "seconds": len(sample.waveform) / SAMPLE_RATE,
            "prompts": [{"prompt": row["prompts"][i], "score": row["scores"][i]} for i in order],
            "audio": "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()}


def render(data: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page. Every number on it carries the path under which report.json has it."""
    def number(path: str, digits: int = 2) -> str:
        value: Any = data
        for part in path.split("/"):
            value = value[int(part)] if isinstance(value, list) else value[part]
        shown = "–" if value is None else f"{value:.{digits}f}"
        return markupsafe.Markup('<span data-path="{}">{}</span>').format(path, shown)

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = [(f"tasks/{name}", name, summary) for name, summary in data["tasks"].items()]
    return environment.get_template("report.html.jinja").render(
        data=data, raw=without_audio(data), number=number, rows=[*rows, ("all", "all", data["all"])],
        pictures={name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()})


def without_audio(data: dict[str, Any]) -> dict[str, Any]:
    """What report.json holds: all but the clips' sound."""
    return {**data, "clips": [{key: value for key, value in row.items() if key != "audio"} for row in data["clips"]]}


def write(run: Evaluated, data: dict[str, Any]) -> Path:
    """Write the page, the numbers and the figures into RUN/report; log them to MLflow where it is on."""
    out = run.folder / "report"
    out.mkdir(exist_ok=True)
    pictures = figures.draw_all(data)
    page = render(data, pictures)
    for name, png in pictures.items():
        (out / f"{name}.png").write_bytes(png)
    (out / "report.json").write_text(json.dumps(without_audio(data), indent=1, ensure_ascii=False) + "\n")
    (out / "report.html").write_text(page)
    tracking.log_files(run.config, run.folder, sorted(out.iterdir()))
    return out / "report.html"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder with results.json")
    parser.add_argument("--clips", type=int, default=3, help="single clips shown for each task (default 3)")
    parser.add_argument("--queries", type=int, default=100, help="clips of each task on the map (default 100)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; a known mistake ends it with one line instead of a traceback."""
    arguments = parse_arguments(argv)
    try:
        run = read_run(arguments.run)
        alone = replace(run.config, device="cpu", parallel=replace(run.config.parallel, llm="replicated"))
        parts = assemble(alone, torch.device("cpu"))
        path = checkpoint.resolve(Path(run.results["checkpoint"]))
        checkpoint.read_state(path)
        checkpoint.load_trainables(path, parts.model.trainable)
        parts.model.eval()
        data = gather(run, parts, arguments.clips, arguments.queries)
        page = write(run, data)
        print(f"{data['verdict']['words']}\n{page}")
        return 0
    except (ReportError, ConfigError, CheckpointError, ShardError, AudioError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(main())
