"""What the benchmark runs on: a config's own models and shards, or random models and a made-up set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from listen_dist.data.features import LogMel
from listen_dist.data.shard_writer import shard_name, write_index, write_shard
from listen_dist.data.text import TextEncoder
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.sharding import sharding_for
from listen_dist.model_sizes import Sizes, count, llm_size
from listen_dist.models.encoders import SpeechEncoder
from listen_dist.models.families import embedding_of
from listen_dist.models.listen import Listen
from listen_dist.models.llm import DTYPES, embedding_stats
from listen_dist.models.projector import build_projector
from listen_dist.models.rivals import build_pool
from listen_dist.schema import Config, SetConfig
from listen_dist.structures import SAMPLE_RATE, AudioSample, Record


@dataclass(frozen=True)
class Shape:
    """Sizes of random models: a Llama and the encoder of a Whisper."""

    width: int
    inner: int
    layers: int
    heads: int
    encoder_width: int
    encoder_layers: int
    encoder_heads: int


SHAPES = {"7b": Shape(4096, 11008, 32, 32, 1280, 32, 20), "small": Shape(64, 160, 2, 4, 32, 2, 2)}
"""`7b`: Llama-7B and Whisper-large-v2. `small`: the same code within seconds on a CPU."""


def build(config: Config, shape: Shape | None, device: torch.device) -> Parts:
    """The parts of a run: the config's own models, or random ones with the config's tokenizer and log-mel."""
    return assemble(config, device) if shape is None else _random_parts(config, shape, device)


def _random_parts(config: Config, shape: Shape, device: torch.device) -> Parts:
    tokenizer = AutoTokenizer.from_pretrained(config.model.llm)
    text, dtype = TextEncoder(tokenizer, config.model), DTYPES[config.model.dtype]
    sharding = sharding_for(config)
    llm_config = _llm_config(shape, len(tokenizer))
    torch.manual_seed(0)
    llm = sharding.load(_random_llm(llm_config, config.model.attention, dtype, device), device)
    mels = WhisperFeatureExtractor.from_pretrained(config.model.speech_encoder).feature_size
    whisper = WhisperConfig(d_model=shape.encoder_width, encoder_layers=shape.encoder_layers, num_mel_bins=mels,
                            encoder_attention_heads=shape.encoder_heads, encoder_ffn_dim=4 * shape.encoder_width)
    whisper._attn_implementation = "sdpa"
    encoder = SpeechEncoder(WhisperEncoder(whisper), whisper).to(device, dtype)
    stats = embedding_stats(embedding_of(llm))
    pool = build_pool(config.pool, stats.mean)
    projector = build_projector(config.projector, encoder.width, shape.width, stats.std)
    model = Listen(llm, encoder, projector.to(device), pool.to(device), text.frame)
    return Parts(config, model, sharding, text, LogMel.from_pretrained(config.model.speech_encoder))


def _llm_config(shape: Shape, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
                       num_hidden_layers=shape.layers, num_attention_heads=shape.heads)


def _random_llm(config: LlamaConfig, attention: str, dtype: torch.dtype, device: torch.device,
                ) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        config._attn_implementation = attention
        with torch.device("meta"):
            llm = LlamaForCausalLM(config).to(dtype)
        llm.to_empty(device=device)
        llm.model.rotary_emb = type(llm.model.rotary_emb)(config, device=device)
        for p in llm.parameters():
            p.data.normal_(std=0.02) if p.dim() > 1 else p.data.fill_(1)
        return llm.requires_grad_(False).eval()

    return make


def sizes(parts: Parts, shape: Shape | None) -> Sizes:
    """The same models as the planner counts them."""
    model = parts.model
    if shape is None:
        size = llm_size(parts.config.model.llm)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _llm_config(shape, model.llm.config.vocab_size).save_pretrained(folder)
            size = llm_size(folder)
    return Sizes(size, count(model.encoder), model.encoder.width, 0, 0, count(model.projector), count(model.pool))


# --- a made-up set -----------------------------------------------------------------------------------------

QUANTILES = ((0.0, 1.4), (0.1, 5.0), (0.25, 11.2), (0.5, 14.0), (0.75, 15.2), (0.9, 15.9), (1.0, 24.5))
"""Seconds of a clip at each share of the set: LibriSpeech's train-clean-100 roughly (mean 12.7 s; most near 15 s)."""
WORDS_A_SECOND = 2.7
WORDS = ("and", "the", "house", "was", "never", "silent", "while", "they", "spoke", "of", "morning", "rivers")


def made_up_set(folder: Path, clips: int, factor: float = 1.0) -> SetConfig:
    """Shards of noise with transcripts of random words, as long as LibriSpeech's clips (times `factor`)."""
    folder.mkdir(parents=True)
    random, (shares, seconds) = np.random.default_rng(0), zip(*QUANTILES, strict=True)
    samples = []
    for number, length in enumerate(factor * np.interp(random.uniform(size=clips), shares, seconds)):
        words = random.choice(WORDS, max(1, round(WORDS_A_SECOND * length)))
        wave = (0.1 * random.standard_normal(round(length * SAMPLE_RATE))).astype(np.float32)
        samples.append(AudioSample(Record(f"made-up-{number}", (), "asr", " ".join(words), language="en"), wave))
    shards = [write_shard(folder / shard_name(start // 50), samples[start : start + 50])
              for start in range(0, clips, 50)]
    write_index(folder, [shard for shard in shards if shard], 0, None)
    return SetConfig(str(folder))


def with_sets(config: Config, sets: list[SetConfig]) -> Config:
    return replace(config, data=replace(config.data, train=sets))
