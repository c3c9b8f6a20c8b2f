"""What a user would run instead: the step of LiSTEN's research code, and a plain Hugging Face Trainer.

Both use the modules of our model (encoder, projector, pool, LLM) and read clips through the same decoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from listen_dist.data.features import LogMel
from listen_dist.data.mixture import SampleRef
from listen_dist.models.listen import Listen
from listen_dist.models.losses import IGNORED
from listen_dist.structures import SAMPLE_RATE, Batch

PADDED_SECONDS = 30


class PaddedLogMel(LogMel):
    """Log-mels of a clip filled up to 30 s with silence, whatever its length."""

    def __init__(self, log_mel: LogMel) -> None:
        vars(self).update(vars(log_mel))

    def __call__(self, waveform: np.ndarray) -> torch.Tensor:
        missing = PADDED_SECONDS * SAMPLE_RATE - len(waveform)
        return super().__call__(np.pad(waveform, (0, max(0, missing))))


def padded_loss(model: Listen, batch: Batch, k: int, match_weight: float) -> torch.Tensor:
    """Loss of a batch with padding on the right and logits for every position, a mean over its target tokens.

    Text is padded with the pad token, which the query's mean takes in like all else; attention leaves it out.
    """
    device, llm, frame = model.device, model.llm, model.frame
    audio, lengths = model.audio_tokens(batch)
    rows = len(batch)

    def embed(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = pad_sequence([torch.tensor(text) for text in texts], True, float(frame.pad)).long().to(device)
        real = pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], True).to(device)
        with torch.no_grad():
            return llm.get_input_embeddings()(ids), real

    after, after_real = embed(batch.after_ids)
    targets, target_real = embed(batch.target_ids)
    bos, bos_real = embed([list(frame.bos)] * rows) if frame.bos else (after[:, :0], after_real[:, :0])
    before, before_real = embed([list(frame.before)] * rows) if frame.before else (after[:, :0], after_real[:, :0])
    audio_real = (torch.arange(audio.shape[1], device=device) < lengths[:, None]).long()
    wrapped = torch.cat([before, audio.to(after.dtype), after], dim=1)
    query = wrapped.float().mean(1)
    similarity = functional.cosine_similarity(query[:, None], model.pool.keys[None], dim=-1)
    scores, chosen = similarity.softmax(-1).topk(k)
    prompts = model.pool.values[chosen].to(after.dtype)
    prompt_real = torch.ones(rows, k, dtype=torch.long, device=device)
    inputs = torch.cat([prompts, bos, wrapped, targets], dim=1)
    mask = torch.cat([prompt_real, bos_real, before_real, audio_real, after_real, target_real], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                 use_cache=False).logits.float()
    labels = torch.full(mask.shape, IGNORED, device=device)
    for row, ids in enumerate(batch.target_ids):
        start = mask.shape[1] - targets.shape[1]
        labels[row, start : start + len(ids)] = torch.tensor(ids, device=device)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return loss - match_weight * scores.sum(1).mean()


def research_step(model: Listen, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], k: int,
                  match_weight: float) -> float:
    """One optimizer step, one `.item()` a micro-batch."""
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = padded_loss(model, batch, k, match_weight) / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


class TrainerModel(nn.Module):
    """Our modules as Hugging Face's Trainer wants them: a forward that returns the loss."""

    def __init__(self, model: Listen, k: int, match_weight: float) -> None:
        super().__init__()
        self.model, self.k, self.match_weight = model, k, match_weight

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": padded_loss(self.model, batch, self.k, self.match_weight)}


class _Refs(Dataset[SampleRef]):
    def __init__(self, refs: Sequence[SampleRef]) -> None:
        self._refs = refs

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, place: int) -> SampleRef:
        return self._refs[place]


class _Marks(TrainerCallback):
    """Calls `begin` when the loop begins, after Trainer's own set-up, and `end` behind the last step."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()


def run_trainer(module: TrainerModel, optimizer: torch.optim.Optimizer, refs: Sequence[SampleRef],
                read: Callable[[list[SampleRef]], Batch], rows: int, accumulate: int, begin: Callable[[], None],
                end: Callable[[], None]) -> float:
    """One pass over the clips in Trainer's own loop and order; the mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate, num_train_epochs=1,
            use_cpu=module.model.device.type == "cpu", report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant")
        trainer = Trainer(module, arguments, data_collator=lambda picked: {"batch": read(picked)},
                          train_dataset=_Refs(refs), optimizers=(optimizer, None), callbacks=[_Marks(begin, end)])
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)
