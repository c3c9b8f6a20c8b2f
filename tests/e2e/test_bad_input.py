"""Mistakes end with one clear line and a code; nothing that was written before is touched.

Most cases call the programs' own `main`, because each launch costs seconds of imports: an
exception that `main` lets through is the traceback that a user would see, and fails the test.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from listen_dist import evaluate as evaluation
from listen_dist import train as training
from listen_dist.data.shards import ShardIndex
from tests import launching, tiny
from tests.fixtures import TrainedRun

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

Program = Callable[..., tuple[int, str]]


@pytest.fixture
def program(tiny_world: tiny.Tiny, capfd: pytest.CaptureFixture[str]) -> Iterator[Program]:
    """Run a program's `main` on one process with an unsharded LLM: its exit code and what it printed."""
    before = dict(os.environ)

    def run(main: Callable[[list[str]], int], *words: str, config: Path = tiny_world.config_file) -> tuple[int, str]:
        try:
            code = main(["--config", str(config), "parallel.llm=replicated", *words])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    yield run
    for key in set(os.environ) - set(before):
        del os.environ[key]


def state_of(folder: Path) -> dict[str, str]:
    """Hash of every file; an empty log may come, since the log is opened before the config is compared."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size}


def error_of(result: tuple[int, str]) -> str:
    code, output = result
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert code != 0 and lines, output
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize("word, parts", [
    ("model.llm=/nowhere/llm", ("model.llm = '/nowhere/llm': no such folder", "tools/get_demo_models.py")),
    ("model.speech_encoder=./nowhere", ("model.speech_encoder = './nowhere': no such folder",)),
    ("model.llm=no-such-owner/no-such-model", ("model.llm = 'no-such-owner/no-such-model'",)),
    ("data.train=[]", ("data.train",)),
    ("data.train[0].path=/nowhere/shards", ("/nowhere/shards", "no such index", "tools/shard_dataset.py")),
    ("projector.init_from=/nowhere", ("/nowhere: no checkpoint here",)),
    ("model.init_from=/nowhere", ("/nowhere: no checkpoint here",)),
])
def test_a_wrong_path_is_named(program: Program, tmp_path: Path, word: str, parts: tuple[str, ...]) -> None:
    line = error_of(program(training.main, f"run_dir={tmp_path / 'run'}", word))
    assert all(part in line for part in parts), line
    assert not list(tmp_path.rglob("state.json"))


def test_a_model_folder_without_a_model_is_named(program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for key in ("model.llm", "model.speech_encoder"):
        line = error_of(program(training.main, f"run_dir={tmp_path / 'run'}", f"{key}={tmp_path / 'empty'}"))
        assert str(tmp_path / "empty") in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_config_on_a_cpu_machine(program: Program, tmp_path: Path) -> None:
    line = error_of(program(training.main, f"run_dir={tmp_path / 'run'}", "device=cuda"))
    assert "device = 'cuda'" in line and "device=cpu" in line
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_cut_short(program: Program, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.speech, tmp_path / "set")
    shard = tmp_path / "set/shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    line = error_of(program(training.main, f"run_dir={tmp_path / 'run'}", f"data.train[0].path={tmp_path / 'set'}"))
    assert "shard-000001.tar: cut short" in line


def test_a_source_that_does_not_answer(program: Program, tmp_path: Path) -> None:
    words = ("data.train[0].path=http://127.0.0.1:1/set", "data.retries=1")
    line = error_of(program(training.main, f"run_dir={tmp_path / 'run'}", *words))
    assert "error: http://127.0.0.1:1/set/index.json: 2 tries in a row failed" in line and "Connection refused" in line


def test_a_second_run_into_the_folder_of_another(program: Program, trained: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path / "run")
    before = state_of(tmp_path)
    run = (f"run_dir={tmp_path / 'run'}", "train.batches_per_step=2")
    line = error_of(program(training.main, *run, "pool.prompts=9", "train.seed=8"))
    assert "step-000012: belongs to another config; these keys differ: pool.prompts, train.seed" in line
    assert state_of(tmp_path) == before
    line = error_of(program(training.main, *run, "train.resume=never"))
    assert "holds step-000012 of an earlier run; set train.resume=auto" in line
    assert state_of(tmp_path) == before
    code, output = program(training.main, *run)
    assert code == 0 and "already trained for 12 steps; raise train.max_steps (or train.max_minutes) to go on" in output
    assert "loading the LLM" not in output
    metrics = "run/metrics.jsonl"
    assert state_of(tmp_path)[metrics] == before[metrics]
    damaged = tmp_path / "run/checkpoints/step-000012/trainables.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    code, output = program(training.main, *run, "train.max_steps=13")
    assert code == 0 and "step-000012/trainables.safetensors: missing or damaged" in output
    assert "going on from" in output and "step-000008" in output


@pytest.mark.parametrize("word, part", [
    ("train.max_step=3", "unknown key 'train.max_step'; the nearest known one is 'train.max_steps'"),
    ("train.max_steps=soon", "train.max_steps"),
    ("pool.top_k=99", "pool.top_k = 99"),
])
def test_a_wrong_word_on_the_command_line(program: Program, tmp_path: Path, word: str, part: str) -> None:
    for main in (training.main, evaluation.main):
        assert part in error_of(program(main, f"run_dir={tmp_path / 'run'}", word))
    assert not (tmp_path / "run").exists()


def test_evaluation_without_sets_or_checkpoint(program: Program, trained: TrainedRun, tmp_path: Path) -> None:
    before = state_of(trained.folder)
    run = f"run_dir={trained.folder}"
    assert "data.test: no set to evaluate" in error_of(program(evaluation.main, run, "data.test=[]"))
    assert "data.dev: no set to evaluate" in error_of(program(evaluation.main, run, "eval.splits=[dev]"))
    assert "no checkpoint here" in error_of(program(evaluation.main, f"run_dir={tmp_path}"))
    assert "belongs to another model" in error_of(program(evaluation.main, run, "pool.prompts=12"))
    assert state_of(trained.folder) == before


def spoil(folder: Path, rows: int) -> list[str]:
    """Flip bytes of the first samples of every shard, after the index was written; their ids."""
    index, ids = ShardIndex.load(folder), []
    for number, shard in enumerate(index.shards):
        table = index.shard_table(number)
        content = bytearray((folder / shard.name).read_bytes())
        for row in range(min(rows, len(table))):
            place = int(table.offset[row]) + 512 + 100
            content[place : place + 200] = bytes(byte ^ 0xFF for byte in content[place : place + 200])
            ids.append(table.ids[row])
        (folder / shard.name).write_bytes(content)
    return ids


def test_single_bad_samples_are_named_and_left_out(program: Program, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    for name, folder in (("train", tiny_world.speech), ("test", tiny_world.test)):
        shutil.copytree(folder, tmp_path / name)
    bad, bad_test = spoil(tmp_path / "train", 1), spoil(tmp_path / "test", 1)
    words = (f"run_dir={tmp_path / 'run'}", f"data.train=[{{path: {tmp_path / 'train'}}}]",
             f"data.test=[{{path: {tmp_path / 'test'}}}]", "train.max_steps=6", "data.max_bad_fraction=0.9")
    code, output = program(training.main, *words)
    assert code == 0 and "Traceback" not in output, output
    named = [json.loads(line) for line in (tmp_path / "run/skipped-rank0.jsonl").read_text().splitlines()]
    assert named and {line["id"] for line in named} <= set(bad)
    assert all(line["reason"] and line["shard"].endswith(".tar") for line in named)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())
    assert last["skipped_samples"] == len(named) == state["skipped_samples"]
    code, output = program(evaluation.main, *words)
    assert code == 0, output
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["skipped"] == len(bad_test) == 2
    assert sum(task["samples"] for task in results["tasks"].values()) == 7 - len(bad_test)
    named = [json.loads(line) for line in (tmp_path / "run/eval_skipped.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in named) == sorted(bad_test)


def test_too_many_bad_samples_end_the_run(program: Program, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny_world.speech, tmp_path / "set")
    spoil(tmp_path / "set", 3)
    words = (f"run_dir={tmp_path / 'run'}", f"data.train=[{{path: {tmp_path / 'set'}}}]", "train.max_steps=90")
    line = error_of(program(training.main, *words))
    assert "samples could not be used (data.max_bad_fraction = 0.1)" in line and "skipped-rank0.jsonl" in line
    spoil(tmp_path / "set", 3)  # whole again
    spoil(tmp_path / "set", 99)
    line = error_of(program(training.main, *words[1:], f"run_dir={tmp_path / 'second'}"))
    assert "none of the first samples of" in line


def test_the_launcher_passes_the_line_and_the_code_on(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    for launcher in ("deepspeed", "python"):
        ended = launching.run([*launching.command(launcher, launching.TRAIN, 2), "--config", tiny_world.config_file,
                               f"run_dir={tmp_path / 'run'}", "data.bach_tokens=2"], 120)
        assert ended.code != 0 and "Traceback" not in ended.output, ended.output
        assert ended.first_error == ("error: command line: unknown key 'data.bach_tokens'; the nearest known one is "
                                     "'data.batch_tokens'")
    assert not (tmp_path / "run").exists()
