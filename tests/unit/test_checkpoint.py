"""Checkpoints, the thread that writes them, and the lock of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from listen_dist.engine import checkpoint
from listen_dist.engine.checkpoint import CheckpointError, TrainState
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.run_lock import RunLock
from listen_dist.engine.saver import Saver
from listen_dist.models.prompt_pool import PromptPool
from listen_dist.schema import Config, ConfigError, PoolConfig, TrainConfig
from listen_dist.structures import LoaderState
from tests import tiny
from tests.unit.test_engine import trainables

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


def trained(seed: int = 0) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    module = trainables(seed)
    optimizer = build_optimizer(module, TrainConfig())
    for step in range(3):
        optimizer.zero_grad()
        sum((p * (step + 1)).square().sum() for p in module.parameters()).backward()
        optimizer.step()
    return module, optimizer


def save(folder: Path, config: Config, state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    return checkpoint.write(folder, checkpoint.snapshot(config, state, module, optimizer))


STATE = TrainState(7, LoaderState(3, 2, 99), 1, 4)


@pytest.fixture
def config(tiny_world: tiny.Tiny) -> Config:
    return tiny_world.config("train.keep=2")


def test_save_and_load_are_exact(config: Config, tmp_path: Path) -> None:
    module, optimizer = trained()
    path = save(tmp_path, config, STATE, module, optimizer)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.yaml", "optimizer.safetensors", "state.json", "trainables.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000007"]
    assert checkpoint.newest(tmp_path) == checkpoint.resolve(tmp_path) == checkpoint.resolve(path) == path
    assert checkpoint.read_state(path) == STATE
    other = trainables(1)
    fresh = build_optimizer(other, TrainConfig())
    checkpoint.load_trainables(path, other)
    checkpoint.load_optimizer(path, other, fresh)
    for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert all(torch.equal(value, fresh.state[b][key]) for key, value in optimizer.state[a].items())
    for m, o in ((module, optimizer), (other, fresh)):
        o.zero_grad()
        sum(p.square().sum() for p in m.parameters()).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_holds_no_pickle(config: Config, tmp_path: Path) -> None:
    path = save(tmp_path, config, STATE, *trained())
    for file in path.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":  # 8 bytes of length, then JSON
            assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            assert file.suffix in (".json", ".yaml") and content.decode().isprintable() is False
            assert json.loads(content) if file.suffix == ".json" else b"run_dir:" in content
    assert sum(file.stat().st_size for file in path.iterdir()) < 200_000


def test_the_last_ones_are_kept_and_latest_is_moved(config: Config, tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 4, 6):
        save(tmp_path, config, TrainState(step), *trained())
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004", "step-000006"]
    assert (tmp_path / "latest").read_text() == "step-000006\n"


def test_going_back_to_an_older_checkpoint_never_drops_the_newest_work(config: Config, tmp_path: Path) -> None:
    """What the message about a damaged checkpoint tells the user to do."""
    for step in (2, 4, 6):
        save(tmp_path, dataclasses.replace(config, train=dataclasses.replace(config.train, keep=3)),
                        TrainState(step), *trained())
    (tmp_path / "latest").write_text("step-000002\n")
    path = save(tmp_path, config, TrainState(3), *trained())
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_state(path).step == 3


def test_steps_beyond_six_digits_are_in_order(config: Config, tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, config, TrainState(step), *trained())
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-1000000", "step-1000001"]


@pytest.mark.parametrize("name", ["trainables.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_refused_by_name(config: Config, tmp_path: Path, name: str) -> None:
    path = save(tmp_path, config, STATE, *trained())
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 0x55
    (path / name).write_bytes(content if name != "state.json" else content[:40])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + r".*damaged.*another checkpoint"):
        checkpoint.read_state(path)
    (path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.read_state(path)


def test_a_damaged_newest_one_falls_back_to_the_one_before(config: Config, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, keep=4))
    for step in (2, 4, 6, 8):
        save(tmp_path, config, TrainState(step), *trained())
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000008" and not caplog.records
    for step, name in ((8, "trainables.safetensors"), (6, "config.yaml"), (4, "state.json")):
        file = tmp_path / f"step-{step:06d}" / name
        file.write_bytes(file.read_bytes()[:-1])
        caplog.clear()
        assert checkpoint.newest(tmp_path) == tmp_path / f"step-{step - 2:06d}"
        said = [record.message for record in caplog.records]
        assert f"step-{step:06d}/{name}" in said[-2] and said[-1] == f"going back to {tmp_path}/step-{step - 2:06d}"
    (tmp_path / "step-000002/optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint here can be used .*step-000002/optimizer.*begin anew"):
        checkpoint.newest(tmp_path)


def test_a_pointer_to_nothing_is_said(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 7):
        path = save(tmp_path, config, TrainState(step), *trained())
    for name in ("step-000009\n", "../elsewhere\n", "\xff"):
        (tmp_path / "latest").write_text(name, encoding="latin-1")
        caplog.clear()
        assert checkpoint.newest(tmp_path) == path
    checkpoint.point(tmp_path, "step-000005")  # as a user who goes back
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000005"
    (tmp_path / "latest").unlink()  # killed before the first one was named
    assert checkpoint.newest(tmp_path) == path
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path / "nothing")


def test_the_best_one_is_never_dropped(config: Config, tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, config, TrainState(step), *trained())
        if step == 2:
            (tmp_path / "best.json").write_text(json.dumps({"best": {"asr": {"step": 2}}}))
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000002", "step-000006", "step-000008"]


def test_what_a_killed_writer_left_is_cleared_away(config: Config, tmp_path: Path) -> None:
    first = save(tmp_path, config, TrainState(2), *trained())
    (tmp_path / ".step-000004.tmp").mkdir()
    (tmp_path / ".step-000004.tmp/trainables.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == first
    save(tmp_path, config, TrainState(4), *trained())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002", "step-000004"]


def test_a_save_holds_the_moment_it_was_asked_for(config: Config, tmp_path: Path) -> None:
    """Training goes on while the thread writes."""
    module, optimizer = trained()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    saver = Saver(tmp_path)
    snapshot = checkpoint.snapshot(config, STATE, module, optimizer)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
            optimizer.state[p]["exp_avg"].fill_(torch.nan)
    saver.save(snapshot)
    saver.finish()
    other = trainables(1)
    checkpoint.load_trainables(tmp_path / "step-000007", other)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    assert all(value.isfinite().all() for value in load_file(tmp_path / "step-000007/optimizer.safetensors").values())


def test_a_failed_save_is_counted_and_the_last_one_raises(config: Config, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver(tmp_path / "checkpoints")
    first = save(tmp_path / "checkpoints", config, TrainState(2), *trained())
    kept = {file.name: file.read_bytes() for file in first.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk: writing fails half-way
    try:
        saver.save(checkpoint.snapshot(config, TrainState(4), *trained()))
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.failed == 1 and "step 4 could not be written ([Errno 27] File too large" in caplog.text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000002"]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == kept
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be written .*File too large"):
        saver.finish()
    saver.save(checkpoint.snapshot(config, TrainState(6), *trained()))  # there is room again
    saver.finish()
    assert checkpoint.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-000006" and saver.failed == 1


def test_a_fault_of_the_writer_is_raised(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write", lambda *_: {}["missing"])
    saver = Saver(tmp_path)
    saver.save(checkpoint.snapshot(config, STATE, *trained()))
    with pytest.raises(KeyError, match="missing"):
        saver.finish()


# --- one run in a folder --------------------------------------------------------------------------


HOLD = ("import sys, pathlib; from listen_dist.engine.run_lock import RunLock; "
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()")


def test_a_folder_is_held_by_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on {socket.gethostname()}, running"):
            RunLock(tmp_path)
    finally:
        holder.kill()  # without a chance to let go
        holder.wait()
    lock = RunLock(tmp_path)
    lock.release()
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_requeued_job_waits_for_the_lock_of_its_lost_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        ending = threading.Timer(0.5, holder.kill)
        ending.start()
        RunLock(tmp_path).release()
        monkeypatch.setenv("SLURM_JOB_ID", "13")
    finally:
        holder.kill()
        holder.wait()


def test_weights_of_another_size_are_refused(config: Config, tmp_path: Path) -> None:
    path = save(tmp_path, config, STATE, *trained())
    other = nn.ModuleDict({"projector": trainables()["projector"],
                           "pool": PromptPool(PoolConfig(prompts=5), torch.zeros(12))})
    with pytest.raises(CheckpointError, match=r"trainables\.safetensors: belongs to another model.*pool\.values"):
        checkpoint.load_trainables(path, other)
    projector = trainables(5)["projector"]
    checkpoint.load_trainables(path, projector, "projector.")
    assert all(torch.equal(a, b) for a, b in zip(projector.parameters(), trained()[0]["projector"].parameters(),
                                                 strict=True))


def test_another_config_is_refused_by_key(config: Config, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    path = save(tmp_path, config, STATE, *trained())
    checkpoint.check_same_config(path, config, {})
    free = ("run_dir=/other", "train.max_steps=99", "eval.beams=4", "parallel.llm=replicated", "data.workers=2",
            "data.test=[]", "train.save_every=3", "tracking.mlflow=true", "pool.top_k=2")
    checkpoint.check_same_config(path, tiny_world.config(*free), {})
    bound = {"pool.prompts": "11", "train.seed": "4", "data.batch_tokens": "99", "model.after_audio": "'{instruction}'",
             "projector.hidden": "40", "train.learning_rate": "0.02"}
    for key, value in bound.items():
        with pytest.raises(ConfigError, match=rf"belongs to another config; these keys differ: {key}\. Choose"):
            checkpoint.check_same_config(path, tiny_world.config(f"{key}={value}"), {})
    with pytest.raises(ConfigError, match=r"data\.train"):
        checkpoint.check_same_config(path, tiny_world.config("data.train[0].weight=5"), {})
