"""One rank of tests/families.py: a step, two ways of decoding and choices, with each LLM that is named.

    python -m tests.distributed.families_worker CONFIG FOLDER {alone,deepspeed,fsdp2} FAMILY …

Writes FOLDER/FAMILY/BACKEND-RANK.json; one process alone also writes plain-0.json, from plain PyTorch.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn import functional
from transformers import PreTrainedModel

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import SampleRef
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.errors import ListenError
from listen_dist.structures import Batch
from tests import families, plain

K = 3
REFS = [SampleRef(0, 0, 0), SampleRef(1, 0, 1), SampleRef(0, 0, 2), SampleRef(0, 0, 3), SampleRef(1, 0, 0),
        SampleRef(0, 0, 1)]
LIMITS = [3, 5, 4, 6, 3, 5]


def halves() -> list[list[SampleRef]]:
    """This rank's micro-batches: two for one process, one for each of two."""
    both = [REFS[:2], REFS[2:]]
    return both if dist.world_size() == 1 else [both[dist.rank()]]


def ours(parts: Parts, reader: BatchReader) -> dict[str, Any]:
    """What the trainer's own code gives; gradients and losses are those of the whole global batch."""
    replicated = ReplicatedTrainables(parts.model.trainable)
    optimizer = build_optimizer(parts.model.trainable, parts.config.train)
    batches = [reader[refs] for refs in halves()]
    found: dict[str, Any] = {}
    for step in range(2):  # the second has a trace of the first to fetch by
        result = train_step(parts.model.train(), replicated, optimizer, parts.config, step, 9, batches, batches[0])
        if step == 0:
            found["grads"] = replicated.grads.tolist()
            losses = {name: float(loss) for batch, out in result.outputs
                      for name, loss in zip(batch.ids, out.row_loss.detach(), strict=True)}
            found["losses"] = [value for _, value in sorted(
                item for one in dist.gather_objects(losses) for item in one.items())]
    return found | said(parts)


def said(parts: Parts) -> dict[str, Any]:
    """All rows decoded by each rank, with whatever layout the LLM has."""
    parts.model.eval()
    batch = parts.reader(parts.config.data.train, with_targets=False)[REFS]
    closed = batch.select([i for i, choices in enumerate(batch.choices) if choices])
    together = dist.world_size() > 1
    likelihoods, _ = parts.model.score(closed, K)
    return {"greedy": parts.model.generate(batch, K, LIMITS, synced_gpus=together)[0],
            "beams": with_beams(parts, batch, together),
            "likelihoods": [float(value) for row in likelihoods for value in row]}


def with_beams(parts: Parts, batch: Batch, together: bool) -> list[list[int]] | None:
    """None where they are refused."""
    try:
        return parts.model.generate(batch, K, LIMITS, synced_gpus=together, num_beams=3)[0]
    except ListenError:
        return None


def truth(parts: Parts, llm: PreTrainedModel, reader: BatchReader, before: dict[str, torch.Tensor],
          ) -> dict[str, Any]:
    """The same from plain PyTorch: clip by clip, unpadded, without a cache."""
    table = llm.get_input_embeddings()(torch.arange(parts.model.llm.get_input_embeddings().num_embeddings))
    if llm.config.model_type == "falcon_h1":  # multiplied where tokens are read, not where embeddings are
        table = table * llm.config.embedding_multiplier
    batch, frame = reader[REFS], parts.model.frame
    parts.model.train()  # answers have frames rounded to float16, as shards store them; training as they come
    clips = prepared(parts, batch)
    weights = {name: value.clone().requires_grad_() for name, value in before.items()}
    k = dist.draw_k(parts.config.train.seed, 0, parts.config.pool.k_max)
    outcomes = [plain.run_clip(llm, weights, clip, frame, 5, k, table) for clip in clips]
    plain.total_loss(outcomes, clips, parts.config.pool.match_weight).backward()
    grads = torch.cat([weights[name].grad.flatten() for name in before])
    found: dict[str, Any] = {"grads": grads.tolist(), "losses": [
        float(one.token_loss.detach()) for _, one in sorted(zip(batch.ids, outcomes, strict=True))]}
    return found | plain_said(parts, llm, table)


def prepared(parts: Parts, batch: Batch) -> list[plain.Clip]:
    frames, counts = parts.model.frames(batch)
    targets = batch.target_ids or [[] for _ in batch.ids]
    return [plain.Clip(frames[i, :n].float(), list(batch.after_ids[i]), list(targets[i]))
            for i, n in enumerate(counts.tolist())]


@torch.no_grad()
def plain_said(parts: Parts, llm: PreTrainedModel, table: torch.Tensor) -> dict[str, Any]:
    """Greedy and beam answers, and choices' likelihoods, with the weights as the step left them."""
    batch, frame = parts.reader(parts.config.data.train, with_targets=False)[REFS], parts.model.frame
    after = {name: p.detach() for name, p in parts.model.trainable.named_parameters()}
    parts.model.eval()
    found: dict[str, Any] = {"greedy": [], "beams": [], "likelihoods": []}
    for i, clip in enumerate(prepared(parts, batch)):
        context = plain.embed_context(llm, after, clip, frame, 5, table)
        _, chosen = plain.choose(after, context, K)
        row = torch.cat([after["pool.values"][chosen], table[list(frame.bos)], context])

        def logits(ids: list[int], row: torch.Tensor = row) -> torch.Tensor:
            return llm(inputs_embeds=torch.cat([row, table[ids]])[None]).logits[0, len(row) - 1:].log_softmax(-1)

        found["greedy"].append(greedy(logits, LIMITS[i], frame.eos))
        found["beams"].append(beams(logits, LIMITS[i], frame.eos, 3))
        for choice in batch.choice_ids[i]:
            found["likelihoods"].append(-float(functional.nll_loss(
                logits(list(choice))[:-1], torch.tensor(choice), reduction="sum")))
    return found


def greedy(logits: Any, limit: int, eos: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < limit:
        best = int(logits(ids)[-1].argmax())
        if best == eos:
            break
        ids.append(best)
    return ids


def beams(logits: Any, limit: int, eos: int, width: int) -> list[int]:
    """Beam search as Hugging Face has it: a beam that ends is scored by its mean; ends at `limit` with EOS."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(limit + 1):
        grown = []
        for score, ids in alive:
            last = logits(ids)[-1]
            if length == limit:
                last = torch.full_like(last, -torch.inf)
                last[eos] = 0.0
            grown += [(score + float(value), [*ids, token])
                      for value, token in zip(*(x.tolist() for x in last.topk(2 * width)), strict=True)]
        grown.sort(key=lambda one: -one[0])
        alive = []
        for rank, (score, ids) in enumerate(grown[: 2 * width]):
            if ids[-1] == eos:
                if rank < width:
                    ended.append((score / len(ids), ids[:-1]))
            elif len(alive) < width:
                alive.append((score, ids))
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        if not alive or (len(ended) == width and alive[0][0] / (length + 1) <= ended[-1][0]):
            break
    return max(ended, key=lambda one: one[0])[1]


def attempt(config_file: str, folder: Path, backend: str) -> None:
    layout = "parallel.llm=replicated" if backend == "alone" else f"parallel.llm=full,parallel.backend={backend}"
    words = [f"model.llm={folder}", *layout.split(","), "train.clip_norm=0",
             f"model.checkpointing={backend != 'alone'}"]
    results: dict[str, dict[str, Any]] = {}
    try:
        try:
            parts = assemble(configuration.load(config_file, words), torch.device("cpu"))
        except ListenError as error:
            if "model.checkpointing" not in str(error):
                raise
            results["note"] = {"checkpointing": str(error)}
            words[-1] = "model.checkpointing=false"
            parts = assemble(configuration.load(config_file, words), torch.device("cpu"))
        reader = parts.reader(parts.config.data.train, with_targets=True)
        before = {name: p.detach().clone() for name, p in parts.model.trainable.named_parameters()}
        results[backend] = ours(parts, reader)
        if backend == "alone":
            results["plain"] = truth(parts, families.load_plain(folder), reader, before)
    except ListenError as error:
        results[backend] = {"refused": str(error).splitlines()[0]}
    except Exception as error:
        results[backend] = {"broken": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
                            "traceback": traceback.format_exc()}
    for name, found in results.items():
        (folder / f"{name}-{dist.rank()}.json").write_text(json.dumps(found))
    if "broken" in results[backend] and dist.world_size() > 1:
        raise AssertionError(results[backend]["broken"])  # the ranks may no longer be in step


def main() -> None:
    config_file, folder, backend, *names = sys.argv[1:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    for name in names:
        attempt(config_file, Path(folder) / name, backend)
    dist.shutdown()


if __name__ == "__main__":
    main()
