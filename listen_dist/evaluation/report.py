"""Open the pool of an evaluated run: a self-contained HTML page, its figures, and the raw numbers.

    python -m listen_dist.evaluation.report --run runs/quickstart

evaluate.py does this at its end; the command does it again, say with more clips. It reads what evaluate.py
left in the run folder (results.json, predictions.jsonl) and the checkpoint that results.json names; writes
RUN/report/report.html, report.json and PNG files, and logs them to the run's MLflow run where
`tracking.mlflow` is on. The LLM serves for its embeddings alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import soundfile
import torch

from listen_dist import config as configuration
from listen_dist import dist, exits, logs, tracking
from listen_dist.command_line import user_path
from listen_dist.data.loader import BatchReader
from listen_dist.data.schedule import SampleRef
from listen_dist.engine import checkpoint
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.errors import ListenError
from listen_dist.evaluation import figures, prompts
from listen_dist.models.families import embedding_of
from listen_dist.models.prompt_pool import Pool
from listen_dist.schema import Config
from listen_dist.structures import SAMPLE_RATE, AudioSample, Batch

TOKENS = 5
"""Nearest vocabulary entries shown for a value."""
BATCH = 16
"""Clips of one pass for queries."""


class ReportError(ListenError):
    """A run that cannot be reported on; the first line names the file and the cure."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation of one split left."""

    folder: Path
    """Of the results; the report goes there."""
    config: Config
    results: dict[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    suffix: str = ""
    """Of the files' names, where several splits were scored into one folder."""

    @property
    def split(self) -> str:
        return str(self.results["split"])

    @property
    def out(self) -> Path:
        return self.folder / f"report{self.suffix}"


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
    config = replace(configuration.load(files["config.yaml"]), run_dir=str(folder))  # it may have been moved
    try:
        results = json.loads(files["results.json"].read_text(encoding="utf-8"))
        predictions = [json.loads(line)  # a text may hold U+2028, which is no line's end here
                       for line in files["predictions.jsonl"].read_text(encoding="utf-8").split("\n") if line]
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


def make(run: Evaluated, parts: Parts, per_task: int = 3, mapped: int = 100) -> Path:
    """Gather the numbers, draw, write; every rank must call it, since the LLM may be sharded. The page's path.

    Args:
        per_task: single clips shown for each task.
        mapped: queries put on the map for each task.

    Raises:
        ReportError: the shards are not those that were evaluated.
        ShardError: a clip could not be read.
    """
    split: list[OpenSplit] = []  # on rank 0 alone, which reads for all: none then waits for one whose disk failed
    dist.on_main(lambda: split.append(open_split(run, parts)))
    queries: dict[tuple[str, str], np.ndarray] = {}
    if hasattr(parts.model.pool, "keys"):
        shown = first_of_each(run.predictions, mapped)
        for start in logs.progress(range(0, len(shown), BATCH), "queries"):
            queries |= queries_of(parts, dist.on_main(lambda rows: split[0].batch(rows), shown[start : start + BATCH]))
    embeddings = vocabulary_embeddings(parts)

    def finish() -> Path:
        clips = [clip(split[0], row, run.config) for row in first_of_each(run.predictions, per_task)]
        return write(run, gather(run, parts, queries, embeddings) | {"clips": clips})

    return dist.on_main(finish)


@dataclass(frozen=True)
class OpenSplit:
    """The samples of a split."""

    reader: BatchReader
    places: Mapping[tuple[str, str], SampleRef]
    """By task and id: the same id may stand in sets of other tasks."""

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The samples of some predictions."""
        return self.reader[[self.places[row["task"], row["id"]] for row in rows]]

    def sample(self, row: Mapping[str, Any], max_seconds: float) -> AudioSample:
        """Record and waveform of a prediction's sample."""
        place = self.places[row["task"], row["id"]]
        return self.reader.indexes[place.set].read_sample(place.shard, place.row, "audio", max_seconds)


def open_split(run: Evaluated, parts: Parts) -> OpenSplit:
    """The evaluated split.

    Raises:
        ReportError: the shards are not those that were evaluated.
    """
    reader = parts.reader(getattr(run.config.data, run.split), with_targets=False)
    places = {}
    for number, index in enumerate(reader.indexes):
        if index.fingerprint not in run.results["data_fingerprints"].values():
            raise ReportError(f"{index.folder}: not the shards that results.json was made from; evaluate again")
        for shard, entry in enumerate(index.shards):
            names = index.shard_table(shard).ids
            places.update({(task, names[row]): SampleRef(number, shard, row)
                           for row in range(entry.samples) for task in entry.tasks})
    missing = [row["id"] for row in run.predictions if (row["task"], row["id"]) not in places]
    if missing:
        raise ReportError(f"{run.folder / f'predictions{run.suffix}.jsonl'}: {missing[0]!r} and perhaps others are "
                          f"not in the {run.split} split; evaluate again")
    return OpenSplit(reader, places)


def gather(run: Evaluated, parts: Parts, queries: Mapping[tuple[str, str], np.ndarray], embeddings: np.ndarray,
           ) -> dict[str, Any]:
    """All numbers of the report but those of single clips.

    Args:
        queries: of `queries_of`.
        embeddings: the LLM's vocabulary [V, D].
    """
    config, rows = run.config.pool, run.predictions
    pool = parts.model.pool
    values = pool.table().detach().cpu().numpy()
    tasks = [row["task"] for row in rows]
    choices = prompts.Choices(tasks, [tuple(row["prompts"]) for row in rows], [tuple(row["scores"]) for row in rows],
                              len(values), weighted=config.selection == "attention")
    table = choices.membership()
    names, overlap = prompts.jaccard(table, tasks)
    everything = prompts.usage_summary(table)
    k = pool.prompt_tokens(int(run.results["k"]))
    recognised = {} if choices.weighted else prompts.recognised(table, tasks)
    state, words = prompts.verdict(config.selection, k, everything, overlap)
    keys = key_table(pool) if queries else None
    return {
        "format_version": 1, "run": Path(run.config.run_dir).name, "checkpoint": run.results["checkpoint"],
        "step": run.results["step"], "split": run.split, "selection": config.selection, "prompts": len(values), "k": k,
        "weighted": choices.weighted, "verdict": {"state": state, "words": words}, "all": everything,
        "tasks": {name: prompts.usage_summary(table[[task == name for task in tasks]]) for name in names},
        "scores": scores(run.results), "recognised": recognised,
        "recognised_mean": sum(recognised.values()) / len(recognised) if recognised else None,
        "most_frequent_set": None if choices.weighted else prompts.most_frequent_set(table),
        "overlap": {"tasks": names, "jaccard": [[None if np.isnan(x) else float(x) for x in row] for row in overlap]},
        "training": training_curves(training_log(run)),
        "map": None if keys is None else key_map(keys, queries),
        "vocabulary": vocabulary(parts, values, embeddings),
    }


def scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each task's main metric with its interval and trivial baseline; None where it was not computed."""
    found = []
    for task, entry in results["tasks"].items():
        metric = entry["metric"]
        low, high = entry["intervals"].get(metric) or (None, None)
        found.append({"task": task, "metric": metric, "better": entry["better"], "value": entry["metrics"].get(metric),
                      "low": low, "high": high, "baseline": entry["baseline"].get(metric)})
    return found


def training_log(run: Evaluated) -> Path:
    """The log of the run that the checkpoint is from; where that was moved, of the run folder."""
    (own, log) = (folder / "metrics.jsonl" for folder in (Path(run.results["checkpoint"]).parent.parent,
                                                          Path(run.config.run_dir)))
    return own if own.is_file() else log


def training_curves(file: Path) -> dict[str, Any]:
    """Steps; effective number and unused share of the prompts at each, of all clips and each task (None: not seen)."""
    lines: dict[int, dict[str, float]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        if "effective_prompts" in line:
            lines[line["step"]] = line  # a step done again after a kill: the last counts
    steps = sorted(lines)
    tasks = sorted({name.removeprefix("effective_prompts_") for line in lines.values() for name in line
                    if name.startswith("effective_prompts_")})
    endings = {"all": "", **{task: f"_{task}" for task in tasks}}
    return {"steps": steps} | {short: {name: [lines[step].get(f"{key}{ending}") for step in steps]
                                       for name, ending in endings.items()}
                               for short, key in (("effective", "effective_prompts"), ("unused", "unused_prompts"))}


@torch.no_grad()
def queries_of(parts: Parts, batch: Batch) -> dict[tuple[str, str], np.ndarray]:
    """The query [D] of each (task, id); every rank must call it."""
    if not len(batch):
        return {}
    found = parts.model.queries(batch).cpu().numpy()
    return dict(zip(zip(batch.tasks, batch.ids, strict=True), found, strict=True))


def key_table(pool: Pool) -> np.ndarray:
    """Keys [N, D]."""
    return np.asarray(pool.get_parameter("keys").detach().cpu().numpy())


def key_map(keys: np.ndarray, queries: Mapping[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    """Keys [N, D] and queries on two principal axes."""
    points, variance = prompts.pca(np.concatenate([keys, np.stack(list(queries.values()))]))
    at = points[len(keys):].tolist()
    return {"keys": points[: len(keys)].tolist(), "variance": variance,
            "queries": [{"id": name, "task": task, "at": place}
                        for (task, name), place in zip(queries, at, strict=True)]}


@torch.no_grad()
def vocabulary_embeddings(parts: Parts) -> np.ndarray:
    """The LLM's embeddings [V, D]; every rank must call it."""
    embedding = embedding_of(parts.model.llm)
    tokens = torch.arange(embedding.num_embeddings, device=parts.model.device)
    return np.asarray(embedding(tokens).float().cpu().numpy())


def vocabulary(parts: Parts, values: np.ndarray, embeddings: np.ndarray) -> list[list[dict[str, Any]]]:
    """The vocabulary entries nearest to each value, best first, with line ends and the like spelt out."""
    return [[{"token": json.dumps(parts.text.piece(token), ensure_ascii=False)[1:-1], "cosine": cosine}
             for token, cosine in row]
            for row in prompts.nearest_tokens(values, embeddings, TOKENS)]


def first_of_each(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first so many rows of each task, in their order."""
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row["task"]] = seen.get(row["task"], 0) + 1
        if seen[row["task"]] <= count:
            kept.append(row)
    return sorted(kept, key=lambda row: row["task"])


def clip(split: OpenSplit, row: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """One clip: what was asked and answered, the prompts with scores, and the audio as a FLAC data address."""
    sample = split.sample(row, config.data.max_seconds)
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
    """Write the page, the numbers and the figures; log those of the run's own folder to MLflow where it is on."""
    run.out.mkdir(exist_ok=True)
    pictures = figures.draw_all(data)
    page = render(data, pictures)
    for name, png in pictures.items():
        (run.out / f"{name}.png").write_bytes(png)
    text = json.dumps(without_audio(data), indent=1, ensure_ascii=False) + "\n"
    (run.out / "report.json").write_text(text, encoding="utf-8")
    (run.out / "report.html").write_text(page, encoding="utf-8")
    if run.folder.resolve() == Path(run.config.run_dir).resolve():
        tracking.log_files(run.config, run.folder, sorted(run.out.iterdir()))
    return run.out / "report.html"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=user_path, help="run folder with results.json")
    parser.add_argument("--clips", type=int, default=3, help="single clips shown for each task (default 3)")
    parser.add_argument("--queries", type=int, default=100, help="clips of each task on the map (default 100)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    try:
        return exits.run(lambda: report(parse_arguments(argv)))
    finally:
        dist.shutdown()


def report(arguments: argparse.Namespace) -> None:
    """Open the pool of a run folder again."""
    run = read_run(arguments.run)
    alone = replace(run.config, device="cpu", parallel=replace(run.config.parallel, llm="replicated"))
    parts = assemble(alone, torch.device("cpu"))
    path = checkpoint.resolve(Path(run.results["checkpoint"]))
    checkpoint.read_state(path)
    checkpoint.load_trainables(path, parts.model.trainable)
    parts.model.eval()
    page = make(run, parts, arguments.clips, arguments.queries)
    written = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    print(f"{written['verdict']['words']}\n{page}")


if __name__ == "__main__":
    sys.exit(main())
