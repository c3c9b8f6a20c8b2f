"""The gradients on any layout are those of one plain PyTorch process on the same global batch.

Real ranks run the trainer's own step. The truth is `tests/plain.py`: clip by clip, unpadded, on one
process, and the loss written from its definition.
"""

from __future__ import annotations

import pytest
import torch

from tests import plain, tiny
from tests.distributed.conftest import Reference
from tests.distributed.gradient_worker import PROBE_K
from tests.distributed.scenarios import Ranks, alone, each, relative

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]


@each
def test_losses_and_gradients_equal_one_plain_process(ranks: list[Ranks], clips: dict[str, plain.Clip],
                                                      reference: Reference, tiny_world: tiny.Tiny, case: int) -> None:
    found = ranks[case]
    step = [notes["steps"][0] for notes in found.notes()]
    batch = [clips[name] for name in found.ids(0)]
    k = step[0]["k"]
    assert {one["k"] for one in step} == {k}
    weights = {name: value.requires_grad_() for name, value in found.tensors("before")[0].items()}
    outcomes = reference(found.weights("before") | weights, batch, k, found.dtype)
    plain.total_loss(outcomes, batch, tiny_world.config().pool.match_weight).backward()
    errors = {}
    for grads in found.tensors("grads"):
        assert set(grads) == set(weights)
        for name, grad in grads.items():
            errors[name] = max(errors.get(name, 0.0), relative(grad, weights[name].grad))
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{found}, k = {k}, {len(batch)} clips: worst relative error {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= 1e-5, errors
    norm = torch.cat([value.grad.flatten() for value in weights.values()]).norm()
    assert all(one["grad_norm"] == pytest.approx(float(norm), rel=1e-5) for one in step)
    assert found.loss(0) == pytest.approx(
        float(sum(one.token_loss for one in outcomes)) / sum(len(clip.target) for clip in batch), rel=1e-5)


def test_bfloat16_is_the_same_on_any_layout(ranks: list[Ranks], clips: dict[str, plain.Clip],
                                            reference: Reference) -> None:
    truths: dict[int, float] = {}
    for found in (one for one in ranks if one.dtype == "bfloat16"):
        one = alone(ranks, found)
        if one.micro_batches not in truths:
            batch = [clips[name] for name in one.ids(0)]
            with torch.no_grad():
                outcomes = reference(one.tensors("before")[0], batch, one.notes()[0]["steps"][0]["k"], one.dtype)
            truths[one.micro_batches] = (float(sum(outcome.token_loss for outcome in outcomes))
                                         / sum(len(clip.target) for clip in batch))
        truth = truths[one.micro_batches]
        errors = [abs(found.loss(0) / truth - 1), *(abs(found.loss(s) / one.loss(s) - 1) for s in range(3))]
        grads = [relative(grad, found.tensors("grads")[0][name]) for name, grad in one.tensors("grads")[0].items()]
        print(f"{found}: loss off by {errors[0]:.1e} from the plain process, by {max(errors[1:]):.1e} from one rank, "
              f"gradients by {max(grads):.1e}")
        assert errors[0] <= 5e-3
        assert max(errors[1:]) <= 1e-3  # after an update that differs in its last bits
        assert max(grads) <= 1e-6


def test_the_scenarios_are_what_they_claim(ranks: list[Ranks]) -> None:
    for found in ranks:
        assert found.ids(0) == alone(ranks, found).ids(0)
        tokens = [notes["steps"][0]["tokens"] for notes in found.notes()]
        assert found.world == 1 or len(set(tokens)) > 1, "ranks hold as many target tokens"
        batches = [notes["steps"][0]["ids"] for notes in found.notes()]
        rounds = -(-found.micro_batches // found.world)
        assert [len(held) for held in batches] == [rounds] * found.world
        empty = [batch for held in batches for batch in held if not batch]
        assert len(empty) == rounds * found.world - found.micro_batches


def test_replicas_stay_the_same_bits_over_three_steps(ranks: list[Ranks]) -> None:
    for found in ranks:
        assert len({notes["checksum"] for notes in found.notes()}) == 1
        before, after = found.tensors("before"), found.tensors("after")
        assert all(torch.equal(value, before[0][key]) for other in before for key, value in other.items())
        assert all(torch.equal(value, after[0][key]) for other in after for key, value in other.items())
        for key, value in alone(ranks, found).tensors("after")[0].items():
            assert not torch.equal(after[0][key], before[0][key]), "nothing was learned"
            if found.dtype == "float32":
                assert relative(after[0][key] - before[0][key], value - before[0][key]) < 1e-3, (str(found), key)


def test_statistics_of_queries_are_the_same_on_all_ranks_and_layouts(ranks: list[Ranks]) -> None:
    for found in (one for one in ranks if one.query == "centred"):
        after = found.tensors("statistics-after")
        assert all(torch.equal(value, after[0][key]) for other in after for key, value in other.items())
        one = alone(ranks, found).tensors("statistics-after")[0]
        assert set(one) == {"pool.query_mean", "pool.query_var", "pool.query_steps"} and one["pool.query_steps"] == 3
        assert all(relative(after[0][key], value) < 1e-4 for key, value in one.items()), str(found)
    assert not any(one.tensors("statistics-after")[0] for one in ranks if one.query == "raw")


def test_layouts_differ_by_rounding_alone(ranks: list[Ranks]) -> None:
    for found in (one for one in ranks if one.dtype == "float32"):
        theirs = alone(ranks, found).tensors("grads")[0]
        for name, grad in found.tensors("grads")[0].items():
            assert relative(grad, theirs[name]) <= 2e-6, (str(found), name)


def test_a_clip_is_the_same_on_any_rank(ranks: list[Ranks], clips: dict[str, plain.Clip],
                                        reference: Reference) -> None:
    for found in (one for one in ranks if one.dtype == "float32"):
        weights = {"probed": found.weights("before"), "probed_again": found.weights("after")}
        with torch.no_grad():
            truth = {(when, name): reference(weights[when], [clips[name]], PROBE_K, found.dtype)[0]
                     for when in weights for name in found.notes()[0]["probed"]}
        for notes in found.notes():
            assert len(notes["probed"]) == 5
            for (when, name), outcome in truth.items():
                loss, *prompts = notes[when][name]
                assert loss == pytest.approx(float(outcome.token_loss), rel=1e-5)
                assert prompts == outcome.chosen


def test_deepspeed_leaves_torch_modules_as_they_were(ranks: list[Ranks]) -> None:
    assert all(notes["generic_works"] for found in ranks for notes in found.notes())
