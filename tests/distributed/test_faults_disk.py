"""A disk that is full or read-only under a run, a folder in use, and single steps that are not finite.

One process calls the trainer's own `main`. The disk is a small tmpfs, mounted for the test: permission bits
would not stop root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from listen_dist import logs, train
from listen_dist.models.listen import Listen
from tests import launching, tiny
from tests.distributed.test_resume import STEPS, read_metrics, reported
from tests.unit.test_checkpoint import HOLD

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tiny_world: tiny.Tiny, capfd: pytest.CaptureFixture[str]) -> Iterator[Train]:
    """The trainer on this process with an unsharded LLM: its exit code and what it printed."""
    before = dict(os.environ)

    def call(folder: Path, *words: str) -> tuple[int, str]:
        code = train.main(["--config", str(tiny_world.config_file), f"run_dir={folder}", "parallel.llm=replicated",
                           "train.save_every=2", "train.keep=9", *words])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    yield call
    for key in set(os.environ) - set(before):
        del os.environ[key]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB, of which three checkpoints fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    logs.setup()  # closes the log of the last run
    subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_run(run: Train, disk: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "unbroken")[0] == 0
    code, output = run(disk / "run")
    assert code == 2 and "Traceback" not in output, output
    assert "could not be written ([Errno 28] No space left on device" in output
    assert f"step {STEPS}/{STEPS} | loss" in output, "training did not go on"
    checkpoints = disk / "run/checkpoints"
    kept = sorted(path.name for path in checkpoints.iterdir())
    assert kept[0] == "latest" and kept[1] == "step-000002" and 2 <= len(kept) <= 4, kept
    assert (checkpoints / "latest").read_text().strip() == kept[-1]
    line = next(line for line in output.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: {checkpoints}: the last checkpoint could not be written ([Errno 28]")
    remount(disk, "size=16m")
    code, output = run(disk / "run")
    assert code == 0 and f"going on from {checkpoints / kept[-1]}" in output, output
    ours, theirs = read_metrics(disk / "run"), read_metrics(tmp_path / "unbroken")
    assert {step: reported(line) for step, line in ours.items()} == {
        step: reported(line) for step, line in theirs.items()}


def test_a_folder_that_cannot_be_written_is_refused_at_start(run: Train, disk: Path, tmp_path: Path) -> None:
    remount(disk, "ro")
    (tmp_path / "file").write_text("in the way")
    for folder, reason in ((disk / "run", "Read-only file system"), (tmp_path / "file/run", "Not a directory")):
        code, output = run(folder)
        line = next(line for line in output.splitlines() if line.startswith("error:"))
        assert code == 2 and f"run_dir = '{folder}': cannot be written:" in line and reason in line, output
        assert "Traceback" not in output


def test_a_folder_in_use_is_refused(run: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              cwd=launching.ROOT)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        code, output = run(folder)
    finally:
        holder.kill()
        holder.wait()
    assert code == 2 and f"in use by process {holder.pid} on" in output
    assert not list(folder.glob("checkpoints/*")) and not (folder / "metrics.jsonl").exists()


def test_a_step_that_is_not_finite_is_left_out_and_training_goes_on(run: Train, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the audio of one batch, then a loss that is infinite while its gradient is not."""
    forward, calls = Listen.forward, iter(range(1000))

    def spoiled(self: Listen, batch: object, k: int) -> object:
        call = next(calls)
        if call == 3:
            batch.audio.fill_(torch.nan)  # type: ignore[attr-defined]
        out = forward(self, batch, k)  # type: ignore[arg-type]
        if call == 6:
            out.row_loss = out.row_loss + torch.inf
        return out

    monkeypatch.setattr(Listen, "forward", spoiled)
    code, output = run(tmp_path / "run", "train.max_skipped_in_a_row=2", "train.batches_per_step=1")
    assert code == 0, output
    named = [json.loads(line) for line in (tmp_path / "run/nonfinite-rank0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in named] == [4, 7] and all(line["ids"] for line in named)
    lines = read_metrics(tmp_path / "run")
    assert [step for step, line in lines.items() if line["skipped_steps"]] == [4, 7]
    assert all(abs(line["loss"]) < 100 for step, line in lines.items() if step not in (4, 7))
    state = json.loads((tmp_path / "run/checkpoints/step-000012/state.json").read_text())
    assert state["skipped_steps"] == 2 and state["skipped_in_a_row"] == 0
    assert "1 steps since the last report had a non-finite loss" in output
