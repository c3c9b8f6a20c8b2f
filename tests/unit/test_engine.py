"""The engine's parts on one process: rates, weight decay, the flat gradient, checkpoints, the meter."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from listen_dist import dist
from listen_dist.config import Config, ConfigError, PoolConfig, ProjectorConfig, TrainConfig
from listen_dist.engine import checkpoint
from listen_dist.engine.checkpoint import CheckpointError, TrainState
from listen_dist.engine.meter import Meter, effective_number
from listen_dist.engine.optim import build_optimizer, learning_rate
from listen_dist.engine.replicated import DriftError, ReplicatedTrainables
from listen_dist.engine.step import StepResult
from listen_dist.models.projector import build_projector
from listen_dist.models.prompt_pool import PromptPool
from listen_dist.structures import Batch, LoaderState, ModelOutput, SkippedSample
from tests import tiny

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]


def trainables(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    projector = build_projector(ProjectorConfig("qformer", hidden=16, heads=2, layers=1), 8, 12, 0.1)
    return nn.ModuleDict({"projector": projector, "pool": PromptPool(PoolConfig(prompts=6), torch.zeros(12))})


# --- optimizer ------------------------------------------------------------------------------------


def test_learning_rate_closed_forms() -> None:
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2)
    assert [learning_rate(config, step, 110) for step in range(10)] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.6)
    assert learning_rate(config, 35, 110) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(config, 110, 110) == learning_rate(config, 999, 110) == pytest.approx(0.2)
    linear = dataclasses.replace(config, schedule="linear")
    assert learning_rate(linear, 35, 110) == pytest.approx(0.8)
    constant = dataclasses.replace(config, schedule="constant")
    assert learning_rate(constant, 109, 110) == 1.0 and learning_rate(constant, 4, 110) == 0.5
    no_warmup = dataclasses.replace(config, warmup_steps=0)
    assert learning_rate(no_warmup, 0, 110) == 1.0
    only_warmup = dataclasses.replace(config, warmup_steps=500)
    assert learning_rate(only_warmup, 109, 110) == pytest.approx(0.22)


def test_weight_decay_is_on_the_projectors_matrices_alone() -> None:
    module = trainables()
    module["projector"].query.requires_grad_(False)
    optimizer = build_optimizer(module, TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.98))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            assert id(p) not in decay
        else:
            matrix = name.startswith("projector.") and p.dim() >= 2
            assert decay[id(p)] == (0.3 if matrix else 0.0), name
    assert all(group["betas"] == (0.8, 0.98) for group in optimizer.param_groups)


def test_k_is_uniform_and_a_pure_function() -> None:
    drawn = [dist.draw_k(5, step, 4) for step in range(4000)]
    assert drawn == [dist.draw_k(5, step, 4) for step in range(4000)]
    assert all(abs(drawn.count(k) - 1000) < 120 for k in (1, 2, 3, 4)) and set(drawn) == {1, 2, 3, 4}
    assert drawn != [dist.draw_k(6, step, 4) for step in range(4000)]


# --- replicated trainables ------------------------------------------------------------------------


def test_gradients_are_views_of_one_flat_buffer() -> None:
    module = trainables()
    replicated = ReplicatedTrainables(module)
    for _ in range(2):  # accumulation
        sum(p.sum() for p in module.parameters()).backward()
    assert torch.equal(replicated.grads, torch.full_like(replicated.grads, 2.0))
    assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() ==
               replicated.grads.untyped_storage().data_ptr() for p in module.parameters())
    for p in module.parameters():
        p.grad = None
    replicated.zero_grads()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_clipping_is_that_of_torch() -> None:
    module = trainables()
    replicated = ReplicatedTrainables(module)
    replicated.grads.copy_(torch.randn_like(replicated.grads))
    before = replicated.grads.clone()
    assert float(replicated.clip(0)) == pytest.approx(float(before.norm()))
    assert torch.equal(replicated.grads, before)
    assert float(replicated.clip(1e6)) == pytest.approx(float(before.norm()))
    assert torch.equal(replicated.grads, before)
    norm = replicated.clip(0.5)
    assert float(norm) == pytest.approx(float(before.norm()))
    torch.testing.assert_close(replicated.grads, before * (0.5 / (before.norm() + 1e-6)))


def test_checksum_sees_one_bit_and_drift_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = trainables()
    replicated = ReplicatedTrainables(module)
    first = replicated.checksum()
    with torch.no_grad():
        module["pool"].keys.view(torch.int32)[3, 3] ^= 1
    assert replicated.checksum() != first
    replicated.prove_equal(3)
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, value, "other"])
    with pytest.raises(DriftError, match=r"step 3: the learned parameters of ranks \[2\] differ"):
        replicated.prove_equal(3)


def test_half_precision_trainables_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        ReplicatedTrainables(trainables().bfloat16())


# --- checkpoints ----------------------------------------------------------------------------------


def trained(seed: int = 0) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    module = trainables(seed)
    optimizer = build_optimizer(module, TrainConfig())
    for step in range(3):
        optimizer.zero_grad()
        sum((p * (step + 1)).square().sum() for p in module.parameters()).backward()
        optimizer.step()
    return module, optimizer


STATE = TrainState(7, LoaderState(3, 2, 99), 1, 4)


@pytest.fixture
def config(tiny_world: tiny.Tiny) -> Config:
    return tiny_world.config("train.keep=2")


def test_save_and_load_are_exact(config: Config, tmp_path: Path) -> None:
    module, optimizer = trained()
    path = checkpoint.save(tmp_path, config, STATE, module, optimizer)
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
    path = checkpoint.save(tmp_path, config, STATE, *trained())
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
        checkpoint.save(tmp_path, config, TrainState(step), *trained())
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004", "step-000006"]
    assert (tmp_path / "latest").read_text() == "step-000006\n"


def test_going_back_to_an_older_checkpoint_never_drops_the_newest_work(config: Config, tmp_path: Path) -> None:
    """What the message about a damaged checkpoint tells the user to do."""
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, dataclasses.replace(config, train=dataclasses.replace(config.train, keep=3)),
                        TrainState(step), *trained())
    (tmp_path / "latest").write_text("step-000002\n")
    path = checkpoint.save(tmp_path, config, TrainState(3), *trained())
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_state(path).step == 3


def test_steps_beyond_six_digits_are_in_order(config: Config, tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, config, TrainState(step), *trained())
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-1000000", "step-1000001"]


@pytest.mark.parametrize("name", ["trainables.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_refused_by_name(config: Config, tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, config, STATE, *trained())
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 0x55
    (path / name).write_bytes(content if name != "state.json" else content[:40])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + r".*damaged.*another checkpoint"):
        checkpoint.read_state(path)
    (path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.read_state(path)


def test_a_pointer_to_nothing_is_refused(config: Config, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, config, STATE, *trained())
    (tmp_path / "latest").write_text("step-000009\n")
    with pytest.raises(CheckpointError, match=r"latest: names 'step-000009'.*write one of \['step-000007'\] into it"):
        checkpoint.newest(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="latest"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path / "nothing")


def test_weights_of_another_size_are_refused(config: Config, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, config, STATE, *trained())
    other = nn.ModuleDict({"projector": trainables()["projector"],
                           "pool": PromptPool(PoolConfig(prompts=5), torch.zeros(12))})
    with pytest.raises(CheckpointError, match=r"trainables\.safetensors: belongs to another model.*pool\.values"):
        checkpoint.load_trainables(path, other)
    projector = trainables(5)["projector"]
    checkpoint.load_trainables(path, projector, "projector.")
    assert all(torch.equal(a, b) for a, b in zip(projector.parameters(), trained()[0]["projector"].parameters(),
                                                 strict=True))


def test_another_config_is_refused_by_key(config: Config, tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, config, STATE, *trained())
    checkpoint.check_same_config(path, config)
    free = ("run_dir=/other", "train.max_steps=99", "eval.beams=4", "parallel.llm=replicated", "data.workers=2",
            "data.test=[]", "train.save_every=3", "tracking.mlflow=true", "pool.top_k=2")
    checkpoint.check_same_config(path, tiny_world.config(*free))
    bound = {"pool.prompts": "11", "train.seed": "4", "data.batch_tokens": "99", "model.after_audio": "'{instruction}'",
             "projector.hidden": "40", "train.learning_rate": "0.02"}
    for key, value in bound.items():
        with pytest.raises(ConfigError, match=rf"belongs to another config; these keys differ: {key}\. Choose"):
            checkpoint.check_same_config(path, tiny_world.config(f"{key}={value}"))
    with pytest.raises(ConfigError, match=r"data\.train"):
        checkpoint.check_same_config(path, tiny_world.config("data.train[0].weight=5"))


# --- meter ----------------------------------------------------------------------------------------


def output(tokens: list[int], losses: list[float], indices: list[list[int]]) -> tuple[Batch, ModelOutput]:
    count = len(tokens)
    batch = Batch([f"c{i}" for i in range(count)], ["asr", "caption"][:count], torch.zeros(0), torch.zeros(count),
                  False, [[]] * count, [[1] * n for n in tokens], [("x",)] * count, [2.5] * count, [])
    out = ModelOutput(torch.tensor(sum(losses)), torch.tensor(-0.2 * count), sum(tokens), count, 10 * count,
                      15 * count, torch.tensor(indices), torch.full((count, 2), 0.1), torch.tensor(losses))
    return batch, out


def test_the_meter_reports_means_over_tokens_and_rows() -> None:
    meter = Meter(4, torch.device("cpu"))
    first, second = output([3, 5], [6.0, 20.0], [[0, 1], [0, 3]]), output([2], [1.0], [[1, -1]])
    applied, left_out = torch.tensor(True), torch.tensor(False)
    meter.add(StepResult([first, second], torch.tensor(1.0), applied, 2, 1e-3), [first[0], second[0]])
    bad = dataclasses.replace(second[0], skipped=[SkippedSample("x", "y", "z")] * 3)
    meter.add(StepResult([second], torch.tensor(torch.nan), left_out, 2, 1e-3), [bad])
    meter.waited(0.25)
    metrics = meter.report()
    assert metrics["loss"] == pytest.approx((26 + 1 + 1) / (8 + 2 + 2))
    assert metrics["loss_asr"] == pytest.approx((6 + 1 + 1) / (3 + 2 + 2))
    assert metrics["loss_caption"] == pytest.approx(20 / 5)
    assert metrics["match_loss"] == pytest.approx(-0.2) and metrics["match_loss_per_key"] == pytest.approx(-0.1)
    assert metrics["padding_share"] == pytest.approx(1 / 3)
    assert metrics["skipped_samples"] == 3 and metrics["skipped_steps"] == 1
    assert metrics["effective_prompts"] == pytest.approx(effective_number([2, 3, 0, 1]))
    assert metrics["waiting_share"] > 0 and metrics["clips_per_second"] > 0
    after = meter.report()
    assert after["loss"] == 0 and after["effective_prompts"] == 0 and after["skipped_samples"] == 3


def test_effective_number_of_prompts() -> None:
    assert effective_number([4, 4, 4]) == pytest.approx(3)
    assert effective_number([9, 0, 0]) == pytest.approx(1)
    assert effective_number([]) == 0
