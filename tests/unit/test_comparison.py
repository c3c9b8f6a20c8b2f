"""The comparison: configs that differ in their subject alone, ranks by hand, and runs that are not run twice."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from listen_dist import config as configuration
from tests import tiny
from tools import run_comparison
from tools.run_comparison import Job, Variant

pytestmark = pytest.mark.timeout(300)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SUBJECT = {
    "rivals/similarity": set(), "rivals/attention": {"pool.selection"}, "rivals/projector_only": {"pool.selection"},
    "rivals/task_static": {"pool.selection"}, "rivals/fixed": {"pool.selection", "pool.prompts"},
    "rivals/lora": {"pool.selection", "lora.rank"}, "ablations/pool_5": {"pool.prompts"},
    "ablations/pool_20": {"pool.prompts"}, "ablations/lambda_0": {"pool.match_weight"},
    "ablations/lambda_0.1": {"pool.match_weight"}, "ablations/fixed_k": {"pool.stochastic_k"},
}


def test_every_config_is_listed() -> None:
    files = {str(file.relative_to(CONFIGS).with_suffix("")) for kind in ("rivals", "ablations")
             for file in (CONFIGS / kind).glob("*.yaml")}
    assert files == set(SUBJECT)


@pytest.mark.parametrize("name", SUBJECT)
def test_a_config_differs_in_its_subject_alone(name: str) -> None:
    ours = configuration.load(CONFIGS / f"{name}.yaml")
    pool = configuration.load(CONFIGS / "rivals/similarity.yaml")
    assert set(configuration.differences(ours, pool)) - {"run_dir"} == SUBJECT[name]
    quickstart = configuration.load(CONFIGS / "quickstart.yaml")
    assert ours.data.train == quickstart.data.train and ours.eval == quickstart.eval
    assert ours.data.batch_prompts is not None
    if ours.pool.selection in ("fixed", "attention"):
        assert ours.data.batch_prompts >= ours.pool.prompts
    assert ours.data.batch_prompts >= ours.pool.k_max


# --- a base under a config ------------------------------------------------------------------------


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_config_replaces_what_its_bases_say(tmp_path: Path) -> None:
    below = "run_dir: r\nmodel: {llm: a, speech_encoder: b}\npool: {prompts: 7, top_k: 2}\n"
    write(tmp_path, below=below, middle="base: below.yaml\npool: {prompts: 8}", top="base: middle.yaml\nrun_dir: s")
    config = configuration.load(tmp_path / "top.yaml", ["model.llm=c"])
    assert (config.run_dir, config.model.llm, config.pool.prompts, config.pool.top_k) == ("s", "c", 8, 2)


@pytest.mark.parametrize("top, message", [
    ("base: none.yaml", r"none.yaml: no such config file \(the base of .*top.yaml\)"),
    ("base: top.yaml", "based on itself"), ("base: middle.yaml", "based on itself"),
    ("base: wrong.yaml", "wrong.yaml: unknown key 'pol'"),
])
def test_a_wrong_base_is_named(tmp_path: Path, top: str, message: str) -> None:
    write(tmp_path, top=top, middle="base: top.yaml", wrong="pol: {}")
    with pytest.raises(configuration.ConfigError, match=message):
        configuration.load(tmp_path / "top.yaml")


# --- the table ------------------------------------------------------------------------------------


def test_mean_ranks_share_ties_and_know_the_direction() -> None:
    scores = {"a": {"asr": 0.2, "qa": 0.5, "bleu": 1.0}, "b": {"asr": 0.3, "qa": 0.9}, "c": {"asr": 0.2, "qa": 0.7}}
    ranks = run_comparison.mean_ranks(scores, {"asr": "lower", "qa": "higher", "bleu": "higher"})
    assert ranks == {"a": (1.5 + 3) / 2, "b": (3 + 1) / 2, "c": (1.5 + 2) / 2}  # bleu: not all have it


def test_interval_over_two_seeds() -> None:
    """Two values x ± d: mean x, standard error d, t(1) = 12.706."""
    assert run_comparison.interval([0.4, 0.6]) == pytest.approx((0.5 - 12.7062 * 0.1, 0.5 + 12.7062 * 0.1), rel=1e-4)
    assert run_comparison.interval([0.4]) is None


def fake_run(job: Job, wer: float, step: int = 12) -> None:
    folder = job.folder / f"checkpoints/step-{step:06d}"
    folder.mkdir(parents=True)
    save_file({"pool.keys": torch.zeros(10, 4), "projector.w": torch.zeros(5)}, folder / "trainables.safetensors")
    (folder.parent / "latest").write_text(folder.name + "\n")
    (job.folder / "config.yaml").write_text(configuration.to_yaml(job.config()))
    (job.folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, "clips_per_second": speed}) + "\n" for i, speed in enumerate((1, 7, 9, 8), 1)))
    entry = {"metric": "wer", "better": "lower", "metrics": {"wer": wer}, "samples": 5,
             "intervals": {"wer": [wer - 0.1, wer + 0.1]}}
    (job.folder / "results.json").write_text(json.dumps({"step": step, "k": 4, "tasks": {"asr": entry}}))


def test_the_table(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    other = write(tmp_path, other=f"base: {tiny_world.config_file}\npool: {{prompts: 9}}") / "other.yaml"
    jobs = [Job(tiny_world.config_file, seed, tmp_path, ()) for seed in (0, 1)] + [Job(other, 0, tmp_path, ())]
    for job, wer in zip(jobs, (0.5, 0.7, 0.3), strict=True):
        fake_run(job, wer)
    table = run_comparison.collect([Variant(file.stem, file) for file in (tiny_world.config_file, other)], jobs)
    ours, theirs = table["rows"]["tiny"], table["rows"]["other"]
    assert ours["learned_parameters"] == 45 and ours["clips_per_second"] == 8 and ours["seeds"] == [0, 1]
    assert ours["tasks"]["asr"]["mean"] == pytest.approx(0.6) and ours["tasks"]["asr"]["values"] == [0.5, 0.7]
    assert theirs["tasks"]["asr"]["interval"] == pytest.approx([0.2, 0.4])  # one seed: evaluate.py's, over clips
    assert (ours["mean_rank"], theirs["mean_rank"]) == (2, 1)
    lines = run_comparison.markdown(table).splitlines()
    assert lines[2] == "| other | 1 | 12 | 45 | 4 | 8.0 | 0.300 [0.200, 0.400] | 1.00 |"
    assert lines[3].startswith("| tiny | 2 | 12 | 45 | 4 | 8.0 | 0.600 [")


def test_the_makefiles_command_is_understood() -> None:
    lines = subprocess.run(["make", "-n", "comparison", "STEPS=7", "SEEDS=0 3"], cwd=CONFIGS.parent, text=True,
                           capture_output=True, check=True, timeout=60).stdout.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if "run_comparison.py" in line)
    arguments = run_comparison.parse_arguments(shlex.split(line.partition("run_comparison.py")[2]))
    assert arguments.seeds == [0, 3] and arguments.top_k == [1, 2, 8] and arguments.ranks == 2
    assert arguments.words == ["configs/rivals/*.yaml", "configs/ablations/*.yaml", "train.max_steps=7"]


def test_done_is_the_same_config_to_its_end(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    job = Job(tiny_world.config_file, 0, tmp_path, ())
    results = job.folder / "results.json"
    assert not run_comparison.is_done(job, results)
    fake_run(job, 0.5)
    assert run_comparison.is_done(job, results)
    assert not run_comparison.is_done(job, job.folder / "k-2/results.json")
    with pytest.raises(configuration.ConfigError, match=r"these keys differ: pool.prompts"):
        run_comparison.is_done(Job(tiny_world.config_file, 0, tmp_path, ("pool.prompts=9",)), results)
    (job.folder / "results.json").write_text('{"step": 8}')
    assert not run_comparison.is_done(job, results)


def test_a_set_of_configs_is_run_once(tiny_world: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    """A real run of one config; the second start finds it done and only prints the table."""
    words = [str(tiny_world.config_file), "train.max_steps=2", "train.batches_per_step=1", "--seeds", "3",
             "--out", str(tmp_path), "--ranks", "1"]
    assert run_comparison.main(words) == 0
    first = capsys.readouterr().out

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"started again: {arguments}")

    monkeypatch.setattr(run_comparison, "launch", refuse)
    assert run_comparison.main(words) == 0
    assert capsys.readouterr().out in first
    row = json.loads((tmp_path / "comparison.json").read_text())["rows"]["tiny"]
    assert row["steps"] == [2] and row["seeds"] == [3] and set(row["tasks"]) == {"asr", "language_id", "speech_qa"}
