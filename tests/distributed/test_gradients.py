"""The gradients on any layout are those of one plain PyTorch process on the same global batch.

Real ranks run the trainer's own step. The truth is `tests/plain.py`: clip by clip, unpadded, on one
process, and the loss written from its definition.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from listen_dist.data.features import LogMel
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.models.encoders import load_speech_encoder
from listen_dist.models.llm import load_tokenizer
from tests import launching, plain, tiny
from tests.distributed.gradient_worker import PROBE_K

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

WORDS = "train.clip_norm=0"
SCENARIOS = {
    1: {"full-1": "train.batches_per_step=1", "full-2": "train.batches_per_step=2",
        "full-3": "train.batches_per_step=3", "full-4": "train.batches_per_step=4"},
    2: {"full-1": "train.batches_per_step=1", "full-2": "train.batches_per_step=2",
        "full-3": "train.batches_per_step=3", "full-4": "train.batches_per_step=4",
        "replicated-4": "train.batches_per_step=4,parallel.llm=replicated"},
}
CASES = [(world, name) for world, scenarios in SCENARIOS.items() for name in scenarios]


@dataclass(frozen=True)
class Ranks:
    """What the ranks of one scenario wrote down."""

    folder: Path
    world: int

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"notes-{rank}.json").read_text()) for rank in range(self.world)]

    def tensors(self, kind: str) -> list[dict[str, Tensor]]:
        return [load_file(self.folder / f"{kind}-{rank}.safetensors") for rank in range(self.world)]

    def ids(self, step: int) -> list[str]:
        """All clips of a step's global batch, in the order of the plan."""
        rounds = zip(*(notes["steps"][step]["ids"] for notes in self.notes()), strict=True)
        return [name for one_round in rounds for batch in one_round for name in batch]


@pytest.fixture(scope="module")
def ranks(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Ranks]:
    """All scenarios, run once: one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("gradients")
    for world, scenarios in SCENARIOS.items():
        words = [f"{name}:{WORDS},{override}" for name, override in scenarios.items()]
        launching.run_ranks(world, "tests.distributed.gradient_worker",
                            [tiny_world.config_file, folder / str(world), *words], folder)
    return {(world, name): Ranks(folder / str(world) / name, world) for world, name in CASES}


@pytest.fixture(scope="module")
def clips(tiny_world: tiny.Tiny) -> dict[str, plain.Clip]:
    """All training clips by id, each prepared alone."""
    config = tiny_world.config()
    text = TextEncoder(load_tokenizer(config.model.llm), config.model)
    encoder = load_speech_encoder(config.model.speech_encoder, torch.float32)
    log_mel = LogMel.from_pretrained(config.model.speech_encoder)
    found = {}
    for entry in config.data.train:
        index = ShardIndex.load(entry.path)
        for shard, row in ((s, r) for s, listed in enumerate(index.shards) for r in range(listed.samples)):
            sample = index.read_sample(shard, row)
            assert sample.waveform is not None
            found[sample.record.id] = plain.Clip(
                encoder.encode([log_mel(sample.waveform)])[0], text.after_ids(sample.record),
                text.target_ids(sample.record.answers[0]))
    return found


@pytest.fixture(scope="module")
def reference(tiny_world: tiny.Tiny) -> Any:
    """The plain process: weights, clips and k to outcomes."""
    config = tiny_world.config()
    llm = AutoModelForCausalLM.from_pretrained(config.model.llm, dtype=torch.float32).eval().requires_grad_(False)
    frame = TextEncoder(load_tokenizer(config.model.llm), config.model).frame

    def outcomes(weights: dict[str, Tensor], batch: list[plain.Clip], k: int) -> list[plain.Outcome]:
        return [plain.run_clip(llm, weights, clip, frame, 5, k) for clip in batch]

    return outcomes


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("case", CASES, ids=[f"{name} on {world}" for world, name in CASES])
def test_gradients_equal_one_plain_process(ranks: dict[tuple[int, str], Ranks], clips: dict[str, plain.Clip],
                                           reference: Any, tiny_world: tiny.Tiny, case: tuple[int, str]) -> None:
    found = ranks[case]
    step = [notes["steps"][0] for notes in found.notes()]
    batch = [clips[name] for name in found.ids(0)]
    k = step[0]["k"]
    assert {one["k"] for one in step} == {k}
    weights = {name: value.requires_grad_() for name, value in found.tensors("before")[0].items()}
    outcomes = reference(weights, batch, k)
    plain.total_loss(outcomes, batch, tiny_world.config().pool.match_weight).backward()
    errors = {}
    for grads in found.tensors("grads"):
        assert set(grads) == set(weights)
        for name, grad in grads.items():
            errors[name] = max(errors.get(name, 0.0), relative(grad, weights[name].grad))
    worst = max(errors, key=errors.__getitem__)
    print(f"\n{case[1]} on {case[0]} rank(s), k = {k}, {len(batch)} clips: worst relative error "
          f"{errors[worst]:.1e} ({worst})")
    assert errors[worst] <= 1e-5, errors
    norm = torch.cat([value.grad.flatten() for value in weights.values()]).norm()
    assert all(one["grad_norm"] == pytest.approx(float(norm), rel=1e-5) for one in step)


def test_the_scenarios_are_what_they_claim(ranks: dict[tuple[int, str], Ranks]) -> None:
    for (world, name), found in ranks.items():
        assert found.ids(0) == ranks[1, f"full-{name[-1]}"].ids(0)
        tokens = [notes["steps"][0]["tokens"] for notes in found.notes()]
        assert len(set(tokens)) == world, "ranks hold as many target tokens"
        batches = [notes["steps"][0]["ids"] for notes in found.notes()]
        assert [len(held) for held in batches] == [-(-int(name[-1]) // world)] * world
        empty = [batch for held in batches for batch in held if not batch]
        assert len(empty) == (1 if world == 2 and name in ("full-1", "full-3") else 0)


def test_replicas_stay_the_same_bits_over_three_steps(ranks: dict[tuple[int, str], Ranks]) -> None:
    for (world, name), found in ranks.items():
        assert len({notes["checksum"] for notes in found.notes()}) == 1
        before, after = found.tensors("before"), found.tensors("after")
        assert all(torch.equal(value, before[0][key]) for other in before for key, value in other.items())
        assert all(torch.equal(value, after[0][key]) for other in after for key, value in other.items())
        alone = ranks[1, f"full-{name[-1]}"].tensors("after")[0]
        for key, value in alone.items():
            assert not torch.equal(after[0][key], before[0][key]), "nothing was learned"
            assert relative(after[0][key] - before[0][key], value - before[0][key]) < 1e-3, (world, name, key)


def test_sharded_and_replicated_llm_give_the_same(ranks: dict[tuple[int, str], Ranks]) -> None:
    full, whole = ranks[2, "full-4"], ranks[2, "replicated-4"]
    for name, grad in full.tensors("grads")[0].items():
        assert relative(grad, whole.tensors("grads")[0][name]) <= 1e-6


def test_a_clip_is_the_same_on_any_rank(ranks: dict[tuple[int, str], Ranks], clips: dict[str, plain.Clip],
                                        reference: Any) -> None:
    weights = ranks[1, "full-2"].tensors("before")[0]
    for found in ranks.values():
        for notes in found.notes():
            assert len(notes["probed"]) == 5
            for name, (loss, *prompts) in notes["probed"].items():
                (truth,) = reference(weights, [clips[name]], PROBE_K)
                assert loss == pytest.approx(float(truth.token_loss), rel=1e-5)
                assert prompts == truth.chosen


def test_deepspeed_leaves_torch_modules_as_they_were(ranks: dict[tuple[int, str], Ranks]) -> None:
    assert all(notes["generic_works"] for found in ranks.values() for notes in found.notes())


def test_each_rank_holds_its_share_of_the_llm(ranks: dict[tuple[int, str], Ranks], tiny_world: tiny.Tiny) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_world.llm)
    whole = 4 * sum(p.numel() for p in llm.parameters())
    kept = 4 * sum(p.numel() for p in llm.parameters() if p.numel() <= 10_000)  # ZeRO leaves small ones gathered
    largest = 4 * max(p.numel() for p in llm.parameters())  # and may fetch one ahead for the next step
    lines = {}
    for (world, name), found in ranks.items():
        for rank, notes in enumerate(found.notes()):
            lines[f"{name}, rank {rank} of {world}"] = (notes["held"], notes["resident"])
    print("\n" + "\n".join(f"{key}: holds {held:,} bytes of {whole:,}, resident after a step {resident:,}"
                           for key, (held, resident) in lines.items()))
    for (world, name), found in ranks.items():
        for notes in found.notes():
            assert notes["held"] == (whole if world == 1 or name == "replicated-4" else whole // 2)
            assert name == "replicated-4" or notes["resident"] <= kept + largest, "gathered weights were not let go"
