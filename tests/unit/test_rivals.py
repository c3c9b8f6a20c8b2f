"""The rivals of the pool: sizes in closed form, losses and gradients against plain computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from listen_dist.data.schedule import SampleRef
from listen_dist.engine.assembly import Parts, assemble, with_pool_tasks
from listen_dist.errors import ListenError
from listen_dist.model_sizes import count
from listen_dist.models.llm import load_llm
from listen_dist.models.rivals import build_pool
from listen_dist.schema import Config, ConfigError
from tests import plain, tiny

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

N, D, LAYERS, TASKS = 10, 64, 3, ("asr", "caption", "language_id", "speech_qa")
Q_OUT, V_OUT = 64, 32
"""The tiny LLM: four query heads and two value heads of 16."""
RIVALS = {
    "similarity": (),
    "attention": ("pool.selection=attention",),
    "task_static": ("pool.selection=task_static", "pool.shared_share=0.6"),
    "fixed": ("pool.selection=fixed", "pool.prompts=20"),
    "none": ("pool.selection=none",),
    "lora": ("pool.selection=none", "lora.rank=8"),
}
LEARNED = {
    "similarity": 2 * N * D, "attention": 2 * N * D, "task_static": N * D, "fixed": 20 * D, "none": 0,
    "lora": LAYERS * 8 * ((D + Q_OUT) + (D + V_OUT)),
}
IN_FRONT = {"similarity": 3, "attention": N, "task_static": 1 + 6, "fixed": 20, "none": 0, "lora": 0}
"""Prompt tokens of a clip at k = 3; of the ten prompts six are shared and each of four tasks owns one."""


@pytest.fixture(scope="module")
def parts_of(tiny_world: tiny.Tiny) -> Any:
    built: dict[str, Parts] = {}

    def parts(name: str) -> Parts:
        if name not in built:
            config = tiny_world.config("parallel.llm=replicated", *RIVALS[name])
            built[name] = assemble(config, torch.device("cpu"))
        return built[name]

    return parts


REFS = [SampleRef(0, 0, 0), SampleRef(0, 0, 2), SampleRef(1, 0, 0), SampleRef(0, 0, 4), SampleRef(1, 0, 1)]


@pytest.mark.parametrize("name", RIVALS)
def test_learned_parameters_and_prompt_length(parts_of: Any, name: str) -> None:
    parts = parts_of(name)
    model = parts.model
    assert count(model.trainable) - count(model.projector) == LEARNED[name]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.trainable.parameters())
    learned = {id(p) for p in model.trainable.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learned
    batch = parts.reader(parts.config.data.train, with_targets=True)[REFS]
    assert set(batch.tasks) == set(TASKS)
    with torch.no_grad():
        matched, rows = model.assemble(batch, 3)
    assert matched.prompts.shape == (len(REFS), IN_FRONT[name], D)
    assert matched.indices.shape == matched.scores.shape == (len(REFS), IN_FRONT[name])
    assert model.pool.prompt_tokens(3) == IN_FRONT[name]
    if name != "similarity":
        assert float(matched.match_loss) == 0 and not matched.row_mass.any()
        assert matched.scores.sum(1).tolist() == pytest.approx([float(IN_FRONT[name] > 0)] * len(REFS))


def prompts_of(name: str, weights: dict[str, Tensor], context: Tensor, task: str) -> Tensor:
    """The definition of each rival, for one clip."""
    if name == "attention":
        query = context.sum(0) / len(context)
        logits = torch.stack([(query * key).sum() for key in weights["pool.keys"]]) / D ** 0.5
        weight = logits.exp() / logits.exp().sum()
        return torch.stack([a * value for a, value in zip(weight, weights["pool.values"], strict=True)])
    if name == "task_static":
        return torch.cat([weights[f"pool.own.{task}"], weights["pool.shared"]])
    return weights["pool.values"] if name == "fixed" else context[:0]


def merged(llm: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LLM's own matrices with each adapter multiplied out and added: W + 32/8 · B A."""
    own = dict(llm.named_parameters())
    for name in own:
        a = weights.get("lora." + name.replace(".weight", ".lora_A").replace(".", "-"))
        if a is not None:
            b = weights["lora." + name.replace(".weight", ".lora_B").replace(".", "-")]
            own[name] = own[name] + 4.0 * b @ a
    return own


def plain_loss(name: str, parts: Parts, weights: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over the clips, one at a time."""
    llm = load_llm(parts.config.model)
    table, frame = llm.get_input_embeddings().weight, parts.text.frame
    reader, total = parts.reader(parts.config.data.train, with_targets=True), torch.zeros(())
    for ref in REFS:
        single = reader[[ref]]
        frames = parts.model.encoder.encode([single.audio[0]])[0]
        clip = plain.Clip(frames, single.after_ids[0], single.target_ids[0])
        context = plain.embed_context(llm, weights, clip, frame, parts.model.projector.window_frames)
        prompts = prompts_of(name, weights, context, single.tasks[0])
        sequence = torch.cat([prompts, table[list(frame.bos)], context, table[clip.target]])
        logits = functional_call(llm, merged(llm, weights), kwargs={"inputs_embeds": sequence[None]}).logits[0]
        predicting = logits[-len(clip.target) - 1 : -1].log_softmax(-1)
        total = total - sum(row[token] for row, token in zip(predicting, clip.target, strict=True))
    return total


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "similarity"])
def test_loss_and_gradients_equal_a_plain_computation(parts_of: Any, name: str) -> None:
    parts = parts_of(name)
    generator = torch.Generator().manual_seed(3)
    for key, p in parts.model.trainable.named_parameters():
        p.grad = None
        if not key.startswith("projector."):  # B starts at zero and keys near it: A and the keys would get no gradient
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    weights = {key: p.detach().clone().requires_grad_() for key, p in parts.model.trainable.named_parameters()}
    ours = parts.model(parts.reader(parts.config.data.train, with_targets=True)[REFS], 3)
    (ours.token_loss_sum + 0.7 * ours.match_loss_sum).backward()
    theirs = plain_loss(name, parts, weights)
    theirs.backward()
    assert float(ours.token_loss_sum.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for key, p in parts.model.trainable.named_parameters():
        assert weights[key].grad.norm() > 1e-4, key  # the keys' is small: the LLM norms what it reads
        assert float((p.grad - weights[key].grad).norm() / weights[key].grad.norm()) < 1e-4, key


def test_lora_begins_as_the_unchanged_llm(tiny_world: tiny.Tiny, parts_of: Any) -> None:
    """B is zero: the same losses as without adapters, although A is random."""
    fresh = assemble(tiny_world.config("parallel.llm=replicated", *RIVALS["lora"]), torch.device("cpu"))
    bare = parts_of("none")
    bare.model.trainable["projector"].load_state_dict(fresh.model.projector.state_dict())
    batch = fresh.reader(fresh.config.data.train, with_targets=True)[REFS]
    with torch.no_grad():
        assert torch.equal(fresh.model(batch, 3).row_loss, bare.model(batch, 3).row_loss)
    assert all(bool(p.any()) == name.endswith("lora_A") for name, p in fresh.model.trainable["lora"].items())


# --- task_static: who owns what -------------------------------------------------------------------


def static(tiny_world: tiny.Tiny, *words: str) -> Config:
    return tiny_world.config("parallel.llm=replicated", "pool.selection=task_static", *words)


def test_tasks_come_from_the_training_sets_in_order(tiny_world: tiny.Tiny, parts_of: Any) -> None:
    parts = parts_of("task_static")
    assert parts.config.pool.tasks == list(TASKS) == list(parts.model.pool.own)
    batch = parts.reader(parts.config.data.train, with_targets=True)[REFS]
    with torch.no_grad():
        matched, _ = parts.model.assemble(batch, 3)
    for row, task in enumerate(batch.tasks):
        assert matched.indices[row].tolist() == [TASKS.index(task), 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("prompts, share, own, shared", [(10, 0.5, 1, 6), (10, 0.0, 2, 2), (16, 0.25, 3, 4),
                                                         (100, 0.9, 2, 92)])
def test_what_cannot_be_divided_is_shared(tiny_world: tiny.Tiny, prompts: int, share: float, own: int,
                                          shared: int) -> None:
    config = with_pool_tasks(static(tiny_world, f"pool.prompts={prompts}", f"pool.shared_share={share}"))
    assert config.pool.task_parts() == (own, shared) and own * len(TASKS) + shared == prompts
    pool = build_pool(config.pool, torch.zeros(D))
    matched = pool(torch.zeros(4, 1, D), torch.ones(4, 1, dtype=torch.bool), TASKS, k=1)
    assert pool.table().shape == (prompts, D) and torch.equal(matched.prompts, pool.table()[matched.indices])
    assert matched.indices[:, :own].flatten().tolist() == list(range(4 * own))
    assert matched.indices[:, own:].tolist() == [list(range(4 * own, prompts))] * 4


def test_a_pool_too_small_for_its_tasks_is_refused(tiny_world: tiny.Tiny) -> None:
    with pytest.raises(ConfigError, match=r"pool.prompts = 10: must be larger, or pool.shared_share = 0.8 smaller"):
        with_pool_tasks(static(tiny_world, "pool.shared_share=0.8"))


def test_a_set_with_an_unknown_task_is_refused_before_it_is_read(tiny_world: tiny.Tiny) -> None:
    parts = assemble(static(tiny_world, "pool.tasks=[asr,language_id]"), torch.device("cpu"))
    assert parts.reader(parts.config.data.train[:1], with_targets=False)
    with pytest.raises(ListenError, match="no prompts were trained for task 'caption', only for asr, language_id"):
        parts.reader(parts.config.data.train, with_targets=False)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("words, message", [
    (("lora.rank=4", "lora.targets=[query]"), r"lora.targets = \['query'\]: no layer of model.llm"),
    (("lora.rank=4", "lora.targets=[]"), r"lora.targets = \[\]: must name a layer"),
    (("pool.shared_share=1.0",), "pool.shared_share = 1.0: must be within"),
    (("pool.selection=none", "projector.freeze=true", "projector.init_from=x"), "leaves nothing to learn"),
])
def test_contradictions_are_refused(tiny_world: tiny.Tiny, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(tiny_world.config("parallel.llm=replicated", *words), torch.device("cpu"))
