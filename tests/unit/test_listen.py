"""The assembled model: equal to plain Hugging Face calls, and the same alone and in a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.evaluation.decoding import Decoder, first_line
from listen_dist.models.llm import load_llm
from listen_dist.schema import EvalConfig
from listen_dist.structures import Batch, Record
from listen_dist.tasks import target_for, token_limit
from tests import plain, tiny

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("one_thread")]

K = 3
SETTINGS = {
    "mlp": (),
    "qformer": ("projector.kind=qformer", "projector.window=0.34"),
    "eager": ("model.attention=eager",),
    "bf16": ("model.dtype=bfloat16",),
}


@pytest.fixture(scope="module")
def parts_of(tiny_world: tiny.Tiny) -> Any:
    """Assembled parts by the name of their settings, each built once."""
    built: dict[str, Parts] = {}

    def parts(name: str) -> Parts:
        if name not in built:
            config = tiny_world.config("parallel.llm=replicated", *SETTINGS[name])
            built[name] = assemble(config, torch.device("cpu"))
        return built[name]

    return parts


def reader_of(parts: Parts, with_targets: bool = True) -> BatchReader:
    return parts.reader(parts.config.data.train, with_targets)


REFS = [SampleRef(0, 0, 0), SampleRef(0, 0, 2), SampleRef(1, 0, 0), SampleRef(0, 0, 4), SampleRef(0, 1, 0),
        SampleRef(1, 0, 1), SampleRef(0, 1, 3)]
"""Clips of all four tasks with unlike durations and targets."""


@contextmanager
def captured_logits(parts: Parts) -> Iterator[list[torch.Tensor]]:
    caught: list[torch.Tensor] = []
    head = parts.model.llm.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: caught.append(output.detach()))
    yield caught
    handle.remove()


def batch_and_singles(parts: Parts, with_targets: bool = True) -> tuple[Batch, list[Batch]]:
    reader = reader_of(parts, with_targets)
    batch = reader[REFS]
    assert len(batch) == len(REFS) and len(set(batch.audio_lengths.tolist())) > 4
    return batch, [reader[[ref]] for ref in REFS]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_clip_is_the_same_alone_and_in_a_batch(parts_of: Any, name: str) -> None:
    parts = parts_of(name)
    batch, singles = batch_and_singles(parts)
    assert len({len(ids) for ids in batch.target_ids}) > 3
    tolerance = {"rtol": 0.03, "atol": 0.25} if name == "bf16" else {"rtol": 1e-5, "atol": 2e-5}
    with torch.no_grad(), captured_logits(parts) as logits:
        together = parts.model(batch, K)
        for row, single in enumerate(singles):
            alone = parts.model(single, K)
            length = len(single.target_ids[0])
            torch.testing.assert_close(logits[0][row, -length - 1 :], logits[-1][0, -length - 1 :], **tolerance)
            torch.testing.assert_close(together.row_loss[row], alone.row_loss[0], **tolerance)
            torch.testing.assert_close(together.prompt_scores[row], alone.prompt_scores[0], rtol=1e-3, atol=1e-4)
            if name == "bf16":  # frames differ in the last bit, so that near ties may fall otherwise
                agreement = len(set(together.prompt_indices[row].tolist()) & set(alone.prompt_indices[0].tolist()))
                assert agreement >= K - 1
            else:
                assert torch.equal(together.prompt_indices[row], alone.prompt_indices[0])
    assert together.input_tokens < together.padded_tokens and together.target_tokens == batch.target_tokens


def plain_clips(parts: Parts, singles: list[Batch]) -> list[plain.Clip]:
    """Each clip's frames by the encoder alone, its texts as the loader gave them."""
    return [plain.Clip(parts.model.encoder.encode([single.audio[0]])[0], single.after_ids[0], single.target_ids[0])
            for single in singles]


def test_loss_and_prompts_equal_plain_hugging_face(parts_of: Any) -> None:
    parts = parts_of("mlp")
    batch, singles = batch_and_singles(parts)
    llm = load_llm(parts.config.model)
    weights = dict(parts.model.trainable.named_parameters())
    with torch.no_grad(), captured_logits(parts) as logits:
        ours = parts.model(batch, K)
        for row, clip in enumerate(plain_clips(parts, singles)):
            theirs = plain.run_clip(llm, weights, clip, parts.text.frame, parts.model.projector.window_frames, K)
            torch.testing.assert_close(ours.row_loss[row], theirs.token_loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits[0][row, -len(clip.target) - 1 : -1], theirs.logits, rtol=1e-4, atol=1e-4)
            assert ours.prompt_indices[row].tolist() == theirs.chosen
            torch.testing.assert_close(ours.prompt_scores[row].sum(), theirs.mass)
    assert float(ours.token_loss_sum) == pytest.approx(float(ours.row_loss.sum()))
    assert ours.target_tokens == sum(len(ids) for ids in batch.target_ids)
    assert ours.rows == len(REFS)


def test_only_target_and_eos_are_counted_and_eos_is(parts_of: Any) -> None:
    parts = parts_of("mlp")
    reader = reader_of(parts)
    batch, shorter = reader[REFS[:2]], reader[REFS[:2]]
    eos = parts.text.frame.eos
    assert [ids[-1] for ids in batch.target_ids] == [eos, eos] and eos not in batch.target_ids[0][:-1]
    shorter.target_ids = [ids[:-1] for ids in batch.target_ids]
    with torch.no_grad(), captured_logits(parts) as logits:
        whole, without = parts.model(batch, K), parts.model(shorter, K)
    last = logits[0][:, -2].log_softmax(-1)[:, eos]  # the place before EOS predicts it
    torch.testing.assert_close(whole.row_loss - without.row_loss, -last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "qformer"])
def test_gradients_reach_what_learns_and_nothing_else(parts_of: Any, name: str) -> None:
    model = parts_of(name).model.train()
    batch = reader_of(parts_of(name))[REFS]

    def gradients(token_weight: float, match_weight: float) -> dict[str, float]:
        model.trainable.zero_grad()
        out = model(batch, K)
        (token_weight * out.token_loss_sum + match_weight * out.match_loss_sum).backward()
        return {key: 0.0 if p.grad is None else float(p.grad.norm())
                for key, p in model.trainable.named_parameters()}

    both, token, match = gradients(1, 1), gradients(1, 0), gradients(0, 1)
    assert all(norm > 0 for norm in both.values()), both
    assert token["pool.keys"] == 0 and token["pool.values"] > 0
    assert match["pool.keys"] > 0 and match["pool.values"] == 0
    assert any(norm > 0 for key, norm in match.items() if key.startswith("projector."))
    assert all(p.grad is None and not p.requires_grad for part in (model.llm, model.encoder)
               for p in part.parameters())
    assert not model.llm.training and not model.encoder.training
    used = model(batch, K).prompt_indices.unique()
    model.trainable.zero_grad()
    model(batch, K).token_loss_sum.backward()
    rows = model.pool.values.grad.norm(dim=1)
    assert set(rows.nonzero().flatten().tolist()) == set(used.tolist())


@pytest.mark.parametrize("beams, name", [(1, "mlp"), (3, "mlp"), (1, "qformer")])
def test_decoding_in_a_batch_equals_one_at_a_time(parts_of: Any, beams: int, name: str) -> None:
    parts = parts_of(name)
    batch, singles = batch_and_singles(parts, with_targets=False)
    limits = list(range(6, 6 + len(REFS)))
    together, matched = parts.model.generate(batch, K, limits, num_beams=beams)
    for row, single in enumerate(singles):
        (alone,), one = parts.model.generate(single, K, limits[row : row + 1], num_beams=beams)
        assert together[row] == alone
        assert torch.equal(matched.indices[row], one.indices[0])
    assert all(parts.text.frame.eos not in ids and len(ids) <= limit
               for ids, limit in zip(together, limits, strict=True))
    assert len({tuple(ids) for ids in together}) > 1


def decoder(parts: Parts, **options: Any) -> Decoder:
    return Decoder(parts, EvalConfig(**options), K, whole=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_rows_token_limit_is_its_own(parts_of: Any, beams: int) -> None:
    """Clips of one task, but of unlike lengths, may say unlike much; beams feel how far the others go on."""
    parts = parts_of("mlp")
    reader = reader_of(parts, with_targets=False)
    table = reader.indexes[0].shard_table
    refs = [SampleRef(0, shard, row) for shard in range(3) for row in range(5) if table(shard).tasks[row] == "asr"]
    batch = reader[refs]
    limits = [token_limit("asr", seconds) for seconds in batch.seconds]
    assert len(set(limits)) > 2
    together = decoder(parts, beams=beams).answer(batch)
    for row, ref in enumerate(refs):
        (alone,) = decoder(parts, beams=beams).answer(reader[[ref]])
        assert alone.text == together[row].text


def test_a_budget_of_one_token_decodes_each_clip_alone(parts_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact mode for bf16: the shape of the batch is the clip's own."""
    parts = parts_of("bf16")
    reader = parts.reader(parts.config.data.test, with_targets=False)
    sizes: list[int] = []
    answer = Decoder._split
    monkeypatch.setattr(Decoder, "_split", lambda self, batch: sizes.append(len(batch)) or answer(self, batch))
    rows, skipped = decoder(parts, batch_tokens=1).decode_set(reader)
    assert sizes == [1] * 7 and not skipped
    names = {name: SampleRef(0, shard, row) for shard in range(len(reader.indexes[0].counts))
             for row, name in enumerate(reader.indexes[0].shard_table(shard).ids)}
    assert rows == [decoder(parts).answer(reader[[names[row.id]]])[0] for row in rows]


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_ends_with_its_line(parts_of: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any token may play the line end for a random LLM; it ends its own row, and is never the first."""
    parts = parts_of("mlp")
    batch, singles = batch_and_singles(parts, with_targets=False)
    limits = [12] * len(batch)
    free, _ = parts.model.generate(batch, K, limits, num_beams=beams)
    stop = next(row[4] for row in free if len(row) > 4 and row[4] != row[0])
    cut, _ = parts.model.generate(batch, K, limits, [stop], num_beams=beams)
    for row, single in enumerate(singles):
        assert stop not in cut[row][:-1] and cut[row][0] != stop
        assert parts.model.generate(single, K, limits[:1], [stop], num_beams=beams)[0] == [cut[row]]
        if beams == 1 and stop in free[row][1:] and free[row][0] != stop:
            assert cut[row] == free[row][: free[row].index(stop) + 1]
    assert any(row[-1] == stop for row in cut)
    reader = reader_of(parts, with_targets=False)
    asr = reader[[SampleRef(0, 0, 0)]]
    (whole,) = decoder(parts).answer(asr)
    assert whole.ended in ("limit", "eos") and "\n" not in whole.text and whole.language == "en"
    ids = parts.model.generate(asr, K, [token_limit("asr", asr.seconds[0])])[0][0]
    monkeypatch.setitem(parts.text.__dict__, "line_ends", (ids[2],) if ids[2] != ids[0] else (ids[3],))
    (short,) = decoder(parts).answer(asr)
    assert short.ended == "line" and whole.text.startswith(short.text) and len(short.text) < len(whole.text)


def test_line_ends_are_found_and_not_learned(parts_of: Any) -> None:
    text = parts_of("mlp").text
    assert {text.piece(token) for token in text.line_ends} == {"\n", "\r"}
    assert [first_line(said) for said in (
        "there's good.\n\nIn this example, a verb", "\n one\r\ntwo", "", "a\u2028b")] == [
        "there's good.", "one", "", "a\u2028b"]
    assert target_for(Record("a", (), "asr", "one\n two\r\n")) == "one two"
    assert target_for(Record("a", (), "speech_qa", "one\ntwo")) == "one\ntwo"
    assert target_for(Record("a", (), "asr", "one  two ")) == "one  two "


def test_greedy_decoding_equals_a_plain_loop(parts_of: Any) -> None:
    parts = parts_of("mlp")
    batch, singles = batch_and_singles(parts, with_targets=False)
    together, _ = parts.model.generate(batch, K, [6] * len(batch), num_beams=1)
    llm, frame = load_llm(parts.config.model), parts.text.frame
    weights = dict(parts.model.trainable.named_parameters())
    for row, clip in enumerate(plain_clips(parts, singles)):
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 6:
                grown = plain.Clip(clip.frames, clip.after, [*said, 0])
                logits = plain.run_clip(llm, weights, grown, frame, parts.model.projector.window_frames, K).logits
                said.append(int(logits[-1].argmax()))
                if said[-1] == frame.eos:
                    said.pop()
                    break
        assert together[row] == said


CHOICES = [("yes", "no"), ("the line is busy", "call", "hold the line please"), ("now", "your call is on hold")]


def with_choices(parts: Parts, batch: Batch, first: int = 0) -> Batch:
    """Candidates of unlike number and length for each row."""
    batch.choices = [CHOICES[(first + row) % len(CHOICES)] for row in range(len(batch))]
    batch.choice_ids = [[parts.text.target_ids(choice) for choice in row] for row in batch.choices]
    return batch


@pytest.mark.parametrize("name", SETTINGS)
def test_choices_are_scored_alike_alone_and_in_a_batch(parts_of: Any, name: str) -> None:
    parts = parts_of(name)
    batch, singles = batch_and_singles(parts, with_targets=False)
    together, matched = parts.model.score(with_choices(parts, batch), K)
    tolerance = {"rtol": 0.03, "atol": 0.25} if name == "bf16" else {"rtol": 1e-5, "atol": 5e-5}
    for row, single in enumerate(singles):
        (alone,), one = parts.model.score(with_choices(parts, single, row), K)
        assert together[row].shape == alone.shape == (len(batch.choices[row]),)
        torch.testing.assert_close(together[row], alone, **tolerance)
        assert name == "bf16" or torch.equal(matched.indices[row], one.indices[0])


def test_likelihoods_equal_plain_hugging_face(parts_of: Any) -> None:
    parts = parts_of("mlp")
    batch, singles = batch_and_singles(parts, with_targets=False)
    ours = decoder(parts).choose(with_choices(parts, batch))
    llm, weights = load_llm(parts.config.model), dict(parts.model.trainable.named_parameters())
    frames = [parts.model.encoder.encode([single.audio[0]])[0] for single in singles]
    picked = set()
    for row, prediction in enumerate(ours):
        theirs = []
        for ids in batch.choice_ids[row]:
            clip = plain.Clip(frames[row], batch.after_ids[row], ids)
            with torch.no_grad():
                outcome = plain.run_clip(llm, weights, clip, parts.text.frame, parts.model.projector.window_frames, K)
            theirs.append(-float(outcome.token_loss))
        assert prediction.likelihoods == pytest.approx(theirs, rel=1e-5, abs=1e-4)
        assert prediction.text == batch.choices[row][max(range(len(theirs)), key=theirs.__getitem__)]
        picked.add(batch.choices[row].index(prediction.text))
    assert len(picked) > 1


def test_closed_and_free_rows_of_a_batch_are_answered_each_in_its_way(parts_of: Any) -> None:
    parts = parts_of("mlp")
    reader = reader_of(parts, with_targets=False)
    batch = reader[[SampleRef(1, 0, 1), SampleRef(1, 0, 3)]]
    assert batch.choices == [("yes", "no")] * 2 and batch.tasks == ["speech_qa"] * 2
    chosen = decoder(parts).answer(batch)
    assert [p.text in p.choices and len(p.likelihoods) == 2 for p in chosen] == [True, True]
    said = decoder(parts, choices="generate", repetition_penalty=5.0).answer(batch)
    assert [p.likelihoods for p in said] == [(), ()]
    assert [p.text for p in said] == [p.text for p in decoder(parts, choices="generate").answer(batch)]
    batch.choices[0] = ()
    mixed = {p.id: p for p in decoder(parts).answer(batch)}
    assert mixed[batch.ids[0]].text == said[0].text and mixed[batch.ids[1]].text == chosen[1].text
    assert mixed[batch.ids[1]].likelihoods == pytest.approx(chosen[1].likelihoods, abs=1e-4)


def test_the_repetition_penalty_acts_on_free_text(parts_of: Any) -> None:
    parts = parts_of("mlp")
    batch = reader_of(parts, with_targets=False)[[SampleRef(0, 0, 0), SampleRef(0, 0, 1), SampleRef(0, 0, 3)]]
    texts = [[p.text for p in decoder(parts, repetition_penalty=value).answer(batch)] for value in (1.0, 5.0)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("beams", [1, 3])
def test_no_run_of_tokens_comes_twice(parts_of: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("mlp")
    batch = reader_of(parts, with_targets=False)[[SampleRef(0, 0, 0), SampleRef(0, 0, 1), SampleRef(0, 0, 3)]]
    said: list[list[int]] = []
    monkeypatch.setattr(type(parts.text), "decode", lambda _self, ids: said.append(ids) or "")

    def most_often(**options: Any) -> int:
        """How often the commonest two tokens in a row come in an answer."""
        said.clear()
        decoder(parts, beams=beams, **options).answer(batch)
        return max(count for ids in said for count in Counter(pairwise(ids)).values())

    assert most_often() > 1
    assert most_often(no_repeat_ngram_size=2) == 1
