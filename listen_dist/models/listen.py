"""LiSTEN assembled: encoder → projector → prompt pool → frozen LLM.

The LLM's input is, row by row and padded on the left,

    [selected prompts k] [BOS] [text before] [audio] [instruction] [target] [EOS]

The same layout serves training and generation. Left padding puts all targets at the
end, so that the LLM computes logits for target positions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from listen_dist.errors import ListenError
from listen_dist.kernels.topk_match.op import TopkMatch
from listen_dist.kernels.topk_match.reference import masked_mean
from listen_dist.models import families
from listen_dist.models.beats import BeatsEncoder
from listen_dist.models.encoders import SpeechEncoder, join_frames
from listen_dist.models.families import embedding_of, run
from listen_dist.models.llm import CompiledLayers, recompute_activations
from listen_dist.models.losses import IGNORED, token_loss
from listen_dist.models.projector import Projector
from listen_dist.models.prompt_pool import Pool
from listen_dist.structures import Batch, ModelOutput, TextFrame


class Listen(nn.Module):
    """The whole model. Only `projector`, `pool` and `lora` learn; `llm` and `encoder` are frozen.

    Args:
        llm: a Hugging Face causal LLM, sharded or whole, in eval mode without gradients.
        encoder: frozen speech encoder; not run for batches of stored features.
        lora: the adapters inside `llm` (see models/lora.py), or None.
        audio_encoder: frozen encoder of other sounds beside the speech encoder, or None.
        compiled: the LLM's layers, compiled for training, or None.
    """

    def __init__(self, llm: PreTrainedModel, encoder: SpeechEncoder, projector: Projector, pool: Pool,
                 frame: TextFrame, lora: nn.ParameterDict | None = None,
                 audio_encoder: BeatsEncoder | None = None, compiled: CompiledLayers | None = None) -> None:
        super().__init__()
        self.llm = llm
        self.encoder = encoder
        self.audio_encoder = audio_encoder
        self.trainable = nn.ModuleDict({"projector": projector, "pool": pool})
        if lora is not None:
            self.trainable["lora"] = lora
        self.frame = frame
        self._compiled = compiled
        self._rows = embedding_of(llm).num_embeddings
        self._caches = families.has_plain_cache(llm)

    @property
    def projector(self) -> Projector:
        return self.trainable["projector"]  # type: ignore[return-value]

    @property
    def pool(self) -> Pool:
        return self.trainable["pool"]  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.projector.out.weight.device

    def train(self, mode: bool = True) -> Listen:
        """Switch the learned parts, and whether the LLM is compiled; the frozen parts stay in eval mode.

        See `recompute_activations` for the one flag in them that changes.
        """
        self.trainable.train(mode)
        recompute_activations(self.llm, mode)
        if self._compiled is not None:
            self._compiled.switch(mode)
        return self

    def forward(self, batch: Batch, k: int) -> ModelOutput:
        """Losses of one micro-batch with k prompts a row (targets must be present)."""
        matched, rows = self.assemble(batch, k)
        embeds, mask = _pad_left(rows)
        if torch.is_grad_enabled() and not embeds.requires_grad:
            # LoRA alone learns. Recomputation, and ZeRO-3's release of a weight, go by the gradient of a layer's input.
            embeds.requires_grad_()
        longest = max(map(len, batch.target_ids))
        labels = torch.full((len(rows), longest), IGNORED)
        for i, ids in enumerate(batch.target_ids):
            labels[i, longest - len(ids):] = torch.tensor(ids)
        labels = labels.to(embeds.device)
        # One position more than targets: the token before a target predicts it.
        logits = run(self.llm, mask, longest + 1, inputs_embeds=embeds, use_cache=False).logits[:, :-1]
        row_loss = token_loss(logits, labels)
        return ModelOutput(
            row_loss=row_loss, match_loss_sum=-matched.row_mass.sum(),
            target_tokens=batch.target_tokens, rows=len(batch), input_tokens=sum(map(len, rows)),
            padded_tokens=mask.numel(), prompt_indices=matched.indices,
            prompt_scores=matched.scores.detach(), observed=self.pool.observe())

    def assemble(self, batch: Batch, k: int) -> tuple[TopkMatch, list[torch.Tensor]]:
        """Select prompts and lay out the LLM's input.

        Returns:
            the match, and for each row its embeddings [L_row, D] in the LLM's dtype:
            prompts, BOS, text before, audio, instruction and, where given, the target.
        """
        bos, contexts, targets = self._parts(batch)
        padded, mask = _pad_right(contexts)
        matched = self.pool(padded, mask, batch.tasks, k)
        prompts = matched.prompts.to(padded.dtype)
        return matched, [torch.cat([prompts[i], bos, contexts[i], targets[i]]) for i in range(len(batch))]

    def queries(self, batch: Batch) -> torch.Tensor:
        """What prompts are matched against, from each row's mean over its context, float32 [B, D]."""
        padded, mask = _pad_right(self._parts(batch)[1])
        return self.pool.prepare(masked_mean(padded.float(), mask))

    def _parts(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """BOS, and each row's context (text before, audio, text after) and target, as embeddings."""
        audio, lengths = self.audio_tokens(batch)
        texts: list[Sequence[int]] = [self.frame.bos, self.frame.before, *batch.after_ids, *batch.target_ids]
        bos, before, *rest = self._embed(texts)
        after, targets = rest[: len(batch)], rest[len(batch):]
        contexts = [torch.cat([before, audio[i, :n].to(before.dtype), after[i]])
                    for i, n in enumerate(lengths.tolist())]
        return bos, contexts, targets

    def audio_tokens(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio tokens [B, A, D] (float32) and their true numbers [B]."""
        return self.projector(*self.frames(batch))

    def frames(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder frames [B, F, E] and their true numbers [B]: stored ones, or from the frozen encoders.

        For an answer each clip is encoded alone in fp32 and rounded to float16, as shards store it. In training the
        whole batch goes at once in the LLM's type: many times faster on a GPU, and within its rounding.
        """
        audio, lengths = (tensor.to(self.device, non_blocking=True) for tensor in (batch.audio, batch.audio_lengths))
        if batch.is_features:
            return audio, lengths
        banks, bank_lengths = batch.fbank, batch.fbank_lengths
        if banks is not None and bank_lengths is not None:
            banks, bank_lengths = banks.to(self.device), bank_lengths.to(self.device)
        if self.trainable.training:
            dtype = self.llm.dtype
            with torch.autocast(self.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                return self._encode(audio, lengths, banks, bank_lengths)
        rows: list[torch.Tensor] = []
        bank_sizes = batch.fbank_lengths.tolist() if batch.fbank_lengths is not None else []  # of the host
        for i, size in enumerate(batch.audio_lengths.tolist()):
            bank, bank_length = None, None
            if banks is not None and bank_lengths is not None:
                bank, bank_length = banks[i : i + 1, : bank_sizes[i]], bank_lengths[i : i + 1]
            frames, _ = self._encode(audio[i : i + 1, :, :size], lengths[i : i + 1], bank, bank_length)
            rows.append(frames[0].half())
        counts = torch.tensor([len(row) for row in rows], device=self.device)
        return pad_sequence(rows, batch_first=True), counts

    def _encode(self, audio: torch.Tensor, lengths: torch.Tensor, banks: torch.Tensor | None,
                bank_lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [B, F, E] of log-mels [B, mels, M], those of both encoders side by side, and their true numbers."""
        frames, counts = self.encoder(audio, lengths)
        if self.audio_encoder is not None:
            assert banks is not None and bank_lengths is not None
            sounds, _ = self.audio_encoder(banks, bank_lengths)
            frames = join_frames(frames, sounds)
        return frames, counts

    def _embed(self, texts: list[Sequence[int]]) -> list[torch.Tensor]:
        """Token embeddings [P, D] of several texts through one call of the LLM's embedding.

        Without gradients: the embedding is frozen, and under ZeRO-3 a graph would keep
        the gathered weight alive until the backward pass.
        """
        tokens = [token for text in texts for token in text]
        if max(tokens, default=0) >= self._rows:
            raise ListenError(f"model.llm: token {max(tokens)} of a text is beyond its embedding of {self._rows} rows "
                              "(config.json); its tokenizer.json must not have tokens that the LLM doesn't know")
        flat = torch.tensor(tokens, dtype=torch.long, device=self.device)
        with torch.no_grad():
            vectors = self.llm.get_input_embeddings()(flat[None])[0]
        return list(vectors.split([len(text) for text in texts]))

    @torch.no_grad()
    def generate(self, batch: Batch, k: int, limits: Sequence[int], stops: Sequence[int] = (),
                 **options: object) -> tuple[list[list[int]], TopkMatch]:
        """Decode every row.

        Args:
            batch: targets empty.
            k: prompts a row.
            limits: most tokens of each row's answer.
            stops: tokens that end an answer as EOS does, but stay in it; never its first one.
            options: for Hugging Face's `generate` (num_beams …). `synced_gpus` is False by default (Hugging
                Face would make ranks wait for each other under FSDP): right while weights are whole. With
                sharded weights every rank must call this alike, with synced_gpus=True.

        Returns:
            token ids of each row up to EOS (without it), and the match.
        """
        matched, rows = self.assemble(batch, k)
        embeds, mask = _pad_left(rows)
        if options.get("num_beams", 1) != 1:
            families.check_beams(self.llm)
        out = self.llm.generate(  # type: ignore[operator]
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, eos_token_id=self.frame.eos,
            pad_token_id=self.frame.pad, max_new_tokens=max(limits) + 1,
            logits_processor=LogitsProcessorList([_RowEnds(limits, stops, self.frame.eos)]),
            **{"synced_gpus": False, **options})
        return [_until(row, self.frame.eos) for row in out.tolist()], matched


    @torch.no_grad()
    def score(self, batch: Batch, k: int) -> tuple[list[torch.Tensor], TopkMatch]:
        """How likely the LLM finds each choice of each row.

        Args:
            batch: targets empty, every row with `choice_ids`.
            k: prompts a row.

        Returns:
            for each row log p(choice and EOS | input), float32 [choices], and the match.
        """
        matched, rows = self.assemble(batch, k)
        counts = [len(row) for row in batch.choice_ids]
        owner = [i for i, count in enumerate(counts) for _ in range(count)]
        ids = [choice for row in batch.choice_ids for choice in row]  # C of them
        labels = pad_sequence([torch.tensor(choice) for choice in ids], batch_first=True, padding_value=IGNORED)
        logits = (self._after_cache if self._caches else self._after_copies)(rows, owner, labels.clamp(min=0))
        return list((-token_loss(logits, labels.to(logits.device))).split(counts)), matched

    def _after_cache(self, rows: list[torch.Tensor], owner: list[int], choices: torch.Tensor) -> torch.Tensor:
        """Logits [C, P, V] of choices [C, P], each behind its row: rows are read once, choices follow on their cache.

        Choices are padded on the right, where no earlier token sees them.
        """
        embeds, mask = _pad_left(rows)
        read = run(self.llm, mask, 1, inputs_embeds=embeds, use_cache=True)
        taken = torch.tensor(owner, device=mask.device)
        read.past_key_values.batch_select_indices(taken)
        said = choices[:, :-1].to(mask.device)
        mask = torch.cat([mask[taken], torch.ones_like(said)], dim=1)
        following = run(self.llm, mask, said.shape[1], input_ids=said, past_key_values=read.past_key_values,
                        use_cache=True)
        return torch.cat([read.logits[taken], following.logits], dim=1)

    def _after_copies(self, rows: list[torch.Tensor], owner: list[int], choices: torch.Tensor) -> torch.Tensor:
        """The same for an LLM without a cache that can be copied and gone on from: a row is read for each choice."""
        said = self._embed(choices[:, :-1].tolist())
        embeds, mask = _pad_left([torch.cat([rows[i], tokens]) for i, tokens in zip(owner, said, strict=True)])
        return run(self.llm, mask, choices.shape[1], inputs_embeds=embeds, use_cache=False).logits  # type: ignore[no-any-return]


class _RowEnds(LogitsProcessor):
    """Ends each row with EOS: at its own limit, and behind a token that stops it.

    Cutting the longer output would do for greedy decoding; but beams still compete after a row's
    end, so that its text would depend on how far the others of the batch may go.
    """

    def __init__(self, limits: Sequence[int], stops: Sequence[int], eos: int) -> None:
        self._limits = torch.tensor(limits)
        self._stops = torch.tensor(stops, dtype=torch.long)
        self._eos = eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [B · beams, generated so far], scores [B · beams, V]."""
        limits = self._limits.to(scores.device).repeat_interleave(len(scores) // len(self._limits))
        over = input_ids.shape[1] >= limits
        stops = self._stops.to(scores.device)
        if input_ids.shape[1]:
            over = over | torch.isin(input_ids[:, -1], stops)
        else:
            scores = scores.index_fill(1, stops, -torch.inf)
        ended = torch.full_like(scores, -torch.inf)
        ended[:, self._eos] = 0
        return torch.where(over[:, None], ended, scores)


def _pad_right(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T_row, D] → padded [B, T, D], and bool mask [B, T], True where real."""
    padded = pad_sequence(rows, batch_first=True)
    sizes = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]


def _pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [L_row, D] → embeds [B, L, D] with zeros on the left, and int64 mask [B, L]."""
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    sizes = torch.tensor([len(row) for row in rows], device=embeds.device)
    places = torch.arange(embeds.shape[1], device=embeds.device)
    return embeds, (places >= embeds.shape[1] - sizes[:, None]).long()


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
