"""The engine's parts on one process: rates, weight decay, the flat gradient, the meter."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from listen_dist import dist
from listen_dist.data import remote
from listen_dist.engine.meter import Meter, effective_number
from listen_dist.engine.optim import build_optimizer, learning_rate
from listen_dist.engine.replicated import DriftError, ReplicatedTrainables
from listen_dist.engine.step import StepResult
from listen_dist.models.projector import build_projector
from listen_dist.models.prompt_pool import PromptPool
from listen_dist.schema import PoolConfig, ProjectorConfig, TrainConfig
from listen_dist.structures import Batch, ModelOutput, SkippedSample

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]


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
    with_pool = build_optimizer(module, TrainConfig(weight_decay=0.3, decay_pool=True))
    decayed = {id(p) for group in with_pool.param_groups if group["weight_decay"] for p in group["params"]}
    assert {id(module["pool"].keys), id(module["pool"].values)} <= decayed


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


# --- meter ----------------------------------------------------------------------------------------


def output(tokens: list[int], losses: list[float], indices: list[list[int]]) -> tuple[Batch, ModelOutput]:
    count = len(tokens)
    batch = Batch([f"c{i}" for i in range(count)], ["asr", "caption"][:count], torch.zeros(0), torch.zeros(count),
                  False, [[]] * count, [[1] * n for n in tokens], [("x",)] * count, [""] * count, [2.5] * count,
                  [()] * count, [[]] * count)
    out = ModelOutput(torch.tensor(losses), torch.tensor(-0.2 * count), sum(tokens), count, 10 * count,
                      15 * count, torch.tensor(indices), torch.full((count, 2), 0.1))
    return batch, out


def test_no_loss_is_reported_where_no_clip_was_usable() -> None:
    meter = Meter(4, torch.device("cpu"))
    meter.add(StepResult([], torch.tensor(0.0), True, False, 2, 1e-3), [])
    metrics = meter.report()
    assert not [name for name in metrics if "loss" in name] and metrics["clips_per_second"] == 0


def test_the_meter_reports_means_over_tokens_and_rows() -> None:
    meter = Meter(4, torch.device("cpu"))
    first, second = output([3, 5], [6.0, 20.0], [[0, 1], [0, 3]]), output([2], [1.0], [[1, -1]])
    meter.add(StepResult([first, second], torch.tensor(1.0), True, False, 2, 1e-3), [first[0], second[0]])
    bad = dataclasses.replace(second[0], skipped=[SkippedSample("x", "y", "z")] * 3)
    meter.add(StepResult([second], torch.tensor(torch.nan), False, False, 2, 1e-3), [bad])
    meter.waited(0.25)
    metrics = meter.report()
    assert metrics["loss"] == pytest.approx((26 + 1 + 1) / (8 + 2 + 2))
    assert metrics["loss_asr"] == pytest.approx((6 + 1 + 1) / (3 + 2 + 2))
    assert metrics["loss_caption"] == pytest.approx(20 / 5)
    assert metrics["match_loss"] == pytest.approx(-0.2) and metrics["match_loss_per_key"] == pytest.approx(-0.1)
    assert metrics["padding_share"] == pytest.approx(1 / 3)
    assert metrics["skipped_samples"] == 3 and metrics["skipped_steps"] == 1
    assert metrics["effective_prompts"] == pytest.approx(effective_number([2, 3, 0, 1]))
    assert metrics["unused_prompts"] == 0.25 and metrics["unused_prompts_caption"] == 0.5
    assert metrics["waiting_share"] > 0 and metrics["clips_per_second"] > 0
    after = meter.report()
    assert "loss" not in after and after["effective_prompts"] == 0 and after["skipped_samples"] == 3


def test_the_meter_counts_retries_by_host() -> None:
    """A loader process's come with its batches, those of the trainer itself are asked for."""
    remote.take_retries()
    meter = Meter(4, torch.device("cpu"), hosts={"b:80", "a"})
    batch, out = output([3], [6.0], [[0, 1]])
    for _ in range(2):
        batch = dataclasses.replace(batch, retries={"b:80": 2})
        meter.add(StepResult([(batch, out)], torch.tensor(1.0), True, False, 2, 1e-3), [batch])
    remote._retried["a"] += 1
    metrics = meter.report()
    assert (metrics["retries_a"], metrics["retries_b_80"], meter.retries) == (1, 4, {"a": 1, "b:80": 4})
    assert meter.report()["retries_b_80"] == 0 and not any(meter.retries.values())
    assert not any(key.startswith("retries") for key in Meter(4, torch.device("cpu")).report())


def test_the_meter_goes_on_from_a_checkpoint() -> None:
    """Stopped between two reports, the next report is that of the unbroken run."""
    batches = [output([3, 5], [6.1, 20.3], [[0, 1], [0, 3]]), output([2], [1.7], [[1, -1]]),
               output([4], [0.9], [[2, 3]])]

    def add(meter: Meter, chosen: list[tuple[Batch, ModelOutput]]) -> Meter:
        for batch in chosen:
            meter.add(StepResult([batch], torch.tensor(1.0), batch is not batches[1], False, 2, 1e-3), [batch[0]])
        return meter

    device = torch.device("cpu")
    unbroken = add(Meter(4, device, 5), batches)
    stopped = add(Meter(4, device, 5), batches[:2])
    state = json.loads(json.dumps(stopped.state()))
    assert add(stopped, batches[2:]).report()["loss"] == pytest.approx(unbroken.state()["sums"]["token_loss"] / 14)
    resumed = add(Meter(4, device, 5, state), batches[2:])
    ours, theirs = resumed.report(), unbroken.report()
    timed = {key for key in ours if key.endswith(("second", "seconds")) or key == "waiting_share"}
    assert {key: value for key, value in ours.items() if key not in timed} == {
        key: value for key, value in theirs.items() if key not in timed}
    assert ours["skipped_steps"] == 1 and ours["elapsed_seconds"] < 5


def test_effective_number_of_prompts() -> None:
    assert effective_number([4, 4, 4]) == pytest.approx(3)
    assert effective_number([9, 0, 0]) == pytest.approx(1)
    assert effective_number([]) == 0
