"""Train and score a set of configs with several seeds, one after another, and print one table.

    python tools/run_comparison.py configs/rivals/*.yaml --seeds 0 1 2
    python tools/run_comparison.py configs/rivals/similarity.yaml configs/ablations/*.yaml --top-k 1 2 4 8

Each run goes to OUT/NAME/seed-S (NAME is the config's file name) and goes on where it was stopped; a run
that is done with the same config is skipped. With --top-k, runs that choose their prompts are scored
once more with each k. Writes OUT/comparison.json and OUT/comparison.md. In brackets: 95 % intervals,
over seeds where there are several, over clips where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from safetensors import safe_open
from scipy import stats

from listen_dist import config as configuration
from listen_dist import exits
from listen_dist.command_line import ConfigParser, user_path
from listen_dist.errors import ListenError
from listen_dist.schema import Config, ConfigError


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config, perhaps scored with another k."""

    name: str
    file: Path
    top_k: int | None = None

    def results(self, folder: Path) -> Path:
        """Where the results of a run in `folder` lie."""
        return folder / ("results.json" if self.top_k is None else f"k-{self.top_k}/results.json")


@dataclass(frozen=True)
class Job:
    """One training run, with its scores."""

    file: Path
    seed: int
    out: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.out / self.file.stem / f"seed-{self.seed}"

    @property
    def words(self) -> list[str]:
        """Overrides of the config; the seed decides the order of samples, k and the initial weights."""
        return [*self.overrides, f"run_dir={self.folder}", f"train.seed={self.seed}", f"model.seed={self.seed}"]

    def config(self) -> Config:
        return configuration.load(self.file, self.words)


def is_done(job: Job, results: Path) -> bool:
    """Whether `results` was made by a finished run of this very config.

    Raises:
        ConfigError: the folder holds a run of another config.
    """
    saved = job.folder / "config.yaml"
    if saved.is_file():
        differing = set(configuration.differences(configuration.load(saved), job.config())) - {"pool.tasks"}
        if differing:
            raise ConfigError(f"{saved}: was made with another config (these keys differ: "
                              f"{', '.join(sorted(differing)[:5])}); move {job.folder} away, or choose another --out")
    if not results.is_file():
        return False
    return bool(json.loads(results.read_text(encoding="utf-8"))["step"] >= job.config().train.max_steps)


def launch(script: str, words: Sequence[str], ranks: int) -> None:
    """Run one of the package's programs on so many ranks.

    Raises:
        ListenError: it failed.
    """
    bin_folder = Path(sys.executable).parent
    head = [str(bin_folder / "deepspeed"), "--num_gpus", str(ranks)] if ranks > 1 else [sys.executable]
    command = [*head, str(ROOT / "listen_dist" / script), *words]
    print("+", " ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise ListenError(f"{script} failed; the command is above, and it goes on where it stopped")


def run_job(job: Job, ks: Sequence[int], ranks: int) -> None:
    """Train and score what is not done yet."""
    plain = Variant(job.file.stem, job.file)
    if not is_done(job, plain.results(job.folder)):
        launch("train.py", ["--config", str(job.file), *job.words], ranks)
        launch("evaluate.py", ["--config", str(job.folder / "config.yaml")], ranks)
    for k in ks if job.config().pool.selection == "similarity" else ():
        results = Variant(job.file.stem, job.file, k).results(job.folder)
        if k <= job.config().pool.prompts and not is_done(job, results):
            launch("evaluate.py", ["--config", str(job.folder / "config.yaml"), "--out", str(results.parent),
                                   f"pool.top_k={k}", "eval.report=false"], ranks)


# --- the table --------------------------------------------------------------------------------------


def learned_parameters(job: Job) -> int:
    """Parameters of the newest checkpoint that learned."""
    folder = job.folder / "checkpoints"
    newest = (folder / "latest").read_text(encoding="utf-8").strip()
    with safe_open(folder / newest / "trainables.safetensors", "pt") as file:
        names = [name for name in file.keys()  # not a dict
                 if not (job.config().projector.freeze and name.startswith("projector."))]
        return sum(int(file.get_tensor(name).numel()) for name in names)


def clips_per_second(job: Job) -> float:
    """The median of what the run reported (the first report holds the start-up)."""
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["clips_per_second"] for line in lines if "clips_per_second" in line]
    return statistics.median(speeds[1:] or speeds)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds by Student's t; None for one seed."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


def mean_ranks(scores: dict[str, dict[str, float]], better: dict[str, str]) -> dict[str, float]:
    """Each variant's rank (1: best, ties share) on each task that all have, averaged over these tasks.

    Args:
        scores: variant → task → value of the task's main metric.
        better: task → "lower" or "higher".
    """
    common = [task for task in better if all(task in row for row in scores.values())]
    ranks: dict[str, list[float]] = {name: [] for name in scores}
    for task in common:
        sign = 1 if better[task] == "lower" else -1
        for name, rank in zip(scores, stats.rankdata([sign * row[task] for row in scores.values()]), strict=True):
            ranks[name].append(float(rank))
    return {name: statistics.fmean(values) for name, values in ranks.items() if values}


def collect(variants: Sequence[Variant], jobs: Sequence[Job]) -> dict[str, Any]:
    """comparison.json: a row for each variant, its figures averaged over seeds."""
    rows: dict[str, Any] = {}
    better: dict[str, str] = {}
    for variant in variants:
        mine = [job for job in jobs if job.file == variant.file and variant.results(job.folder).is_file()]
        if not mine:
            continue
        results = [json.loads(variant.results(job.folder).read_text(encoding="utf-8")) for job in mine]
        tasks = {}
        for task in results[0]["tasks"]:
            entries = [result["tasks"][task] for result in results]
            metric = entries[0]["metric"]
            values = [entry["metrics"][metric] for entry in entries]
            better[task] = entries[0]["better"]
            # One seed: evaluate.py's own interval, over clips.
            over_clips = entries[0].get("intervals", {}).get(metric) if len(values) == 1 else None
            tasks[task] = {"metric": metric, "mean": statistics.fmean(values), "values": values,
                           "interval": over_clips or interval(values), "samples": entries[0]["samples"]}
        rows[variant.name] = {
            "config": str(variant.file), "seeds": [job.seed for job in mine],
            "steps": [result["step"] for result in results], "k": results[0]["k"],
            "learned_parameters": learned_parameters(mine[0]),
            "clips_per_second": statistics.fmean(clips_per_second(job) for job in mine), "tasks": tasks}
    means = {name: {task: entry["mean"] for task, entry in row["tasks"].items()} for name, row in rows.items()}
    for name, rank in mean_ranks(means, better).items():
        rows[name]["mean_rank"] = rank
    return {"format_version": 1, "better": better, "rows": rows}


def markdown(table: dict[str, Any]) -> str:
    """The table for people: best mean rank first."""
    tasks = list(table["better"])
    metrics = {task: entry["metric"] for row in table["rows"].values() for task, entry in row["tasks"].items()}
    arrows = {"lower": "↓", "higher": "↑"}
    heads = ["variant", "seeds", "steps", "learned parameters", "prompt tokens", "clips/s",
             *(f"{task} ({metrics[task]} {arrows[table['better'][task]]})" for task in tasks), "mean rank"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in sorted(table["rows"].items(), key=lambda item: item[1].get("mean_rank", float("inf"))):
        cells = [name, str(len(row["seeds"])), "/".join(map(str, sorted(set(row["steps"])))),
                 f"{row['learned_parameters']:,}", str(row["k"]), f"{row['clips_per_second']:.1f}"]
        cells += [_cell(row["tasks"].get(task)) for task in tasks]
        cells.append(f"{row['mean_rank']:.2f}" if "mean_rank" in row else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    within = f" [{entry['interval'][0]:.3f}, {entry['interval'][1]:.3f}]" if entry["interval"] else ""
    return f"{entry['mean']:.3f}{within}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="CONFIG or key=value", help="configs, and overrides for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--top-k", type=int, nargs="+", default=[], help="score once more with these k")
    parser.add_argument("--out", type=user_path, default=Path("runs/comparison"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--table-only", action="store_true", help="run nothing; tabulate what is there")
    parser.add_argument("--json", action="store_true", help="print comparison.json instead of the table")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    return exits.run(lambda: compare(parse_arguments(argv)))


def compare(arguments: argparse.Namespace) -> None:
    """Do the runs that are not done, and write the table."""
    files = [Path(word) for word in arguments.words if "=" not in word]
    overrides = tuple(word for word in arguments.words if "=" in word)
    jobs = [Job(file, seed, arguments.out, overrides) for file in files for seed in arguments.seeds]
    variants = [Variant(file.stem, file) for file in files]
    variants += [Variant(f"{file.stem}, k = {k}", file, k) for file in files for k in arguments.top_k]
    for job in jobs:
        job.config()  # a mistake in the last config shows before the first run
    if len({file.stem for file in files}) < len(files):
        raise ConfigError("two configs have the same file name; their runs would go to one folder")
    for job in () if arguments.table_only else jobs:
        run_job(job, arguments.top_k, arguments.ranks)
    table = collect(variants, jobs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "comparison.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "comparison.md").write_text(markdown(table), encoding="utf-8")
    print(json.dumps(table, indent=1) if arguments.json else markdown(table))


if __name__ == "__main__":
    sys.exit(main())
