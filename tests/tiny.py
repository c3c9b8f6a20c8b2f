"""Builders of tiny models and shard sets, from nothing and within seconds: no download, no recording.

The models are random, with a wide enough spread that a wrong mask, position or pad changes a
result well above rounding. The audio is real FLAC of tones and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from listen_dist import config as configuration
from listen_dist.data.shard_writer import shard_name, write_index, write_shard
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.models import beats
from listen_dist.schema import Config
from listen_dist.structures import SAMPLE_RATE, AudioSample, Record

WORDS = ("the", "quick", "agent", "line", "is", "busy", "please", "hold", "your", "call", "now", "forward")
LANGUAGES = ("english", "french", "russian")


@dataclass(frozen=True)
class Tiny:
    """A world of tiny things in one folder."""

    root: Path

    @property
    def llm(self) -> Path:
        return self.root / "llm"

    @property
    def encoder(self) -> Path:
        return self.root / "whisper"

    @property
    def audio_encoder(self) -> Path:
        """A BEATs checkpoint; not part of `config_file`."""
        return self.root / "beats.pt"

    @property
    def speech(self) -> Path:
        """Training set of `asr` and `language_id`, 24 clips."""
        return self.root / "speech"

    @property
    def sounds(self) -> Path:
        """Training set of `caption` and `speech_qa`, 12 clips."""
        return self.root / "sounds"

    @property
    def test(self) -> Path:
        """Seven clips (odd on purpose) of three tasks."""
        return self.root / "test"

    @property
    def config_file(self) -> Path:
        return self.root / "tiny.yaml"

    def config(self, *overrides: str) -> Config:
        """The tiny configuration, with `key=value` words applied."""
        return configuration.load(self.config_file, overrides)


def build(root: Path) -> Tiny:
    """Write models, shards and the configuration into `root`."""
    tiny = Tiny(root)
    build_llm(tiny.llm)
    build_encoder(tiny.encoder)
    write_set(tiny.speech, speech_records(24))
    write_set(tiny.sounds, sound_records(12))
    write_set(tiny.test, [*speech_records(5, "test"), *sound_records(4, "test")[1::2]])
    tiny.config_file.write_text(yaml.safe_dump(config_tree(tiny), sort_keys=False))
    return tiny


def config_tree(tiny: Tiny) -> dict[str, Any]:
    return {
        "run_dir": str(tiny.root / "run"),
        "device": "cpu",
        "model": {"llm": str(tiny.llm), "speech_encoder": str(tiny.encoder), "dtype": "float32",
                  "before_audio": "user: ", "after_audio": " {instruction} model: "},
        "projector": {"kind": "mlp", "window": 0.1, "hidden": 48, "layers": 1, "heads": 4},
        "pool": {"prompts": 10, "top_k": 4, "match_weight": 0.7},
        "data": {"train": [{"path": str(tiny.speech), "weight": 2.0}, {"path": str(tiny.sounds)}],
                 "test": [{"path": str(tiny.test)}], "batch_tokens": 320, "window": 12},
        "train": {"max_steps": 12, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 3,
                  "log_every": 1, "save_every": 4, "checksum_every": 2, "keep": 3},
        "parallel": {"timeout_minutes": 10.0, "max_live_parameters": 1000},
        "eval": {"report": False},
        "tracking": {"mlflow": False},
    }


# --- models ---------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 256 bytes, some 50 merges and the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] + ["user: model: Transcribe. Which?"]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_llm(folder: Path) -> None:
    """A random Llama of width 64 with grouped queries and tied embeddings."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.15, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)


def save_wider_llm(folder: Path) -> None:
    """A random Llama of width 256 in bfloat16: its weights outweigh what travels beside them."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)).bfloat16().save_pretrained(folder)


def build_encoder(folder: Path) -> None:
    """A random Whisper of width 32 with the usual 80 mels and 30 s window."""
    torch.manual_seed(2)
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=1500,
        max_target_positions=16, num_mel_bins=80, init_std=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def build_audio_encoder(file: Path) -> None:
    """A random BEATs of width 24 in the authors' checkpoint format: sizes and weights, weight norm in two parts."""
    torch.manual_seed(3)
    cfg = {"input_patch_size": 16, "embed_dim": 16, "conv_bias": False, "encoder_layers": 2, "encoder_embed_dim": 24,
           "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 4, "layer_norm_first": False,
           "deep_norm": True, "conv_pos": 16, "conv_pos_groups": 4, "relative_position_embedding": True,
           "num_buckets": 32, "max_distance": 80, "gru_rel_pos": True, "activation_fn": "gelu"}
    speechbrain = beats.implementation()
    encoder = speechbrain.TransformerEncoder(speechbrain.BEATsConfig(cfg)).requires_grad_(False)
    for p in encoder.parameters():
        if p.dim() > 1:
            p.normal_(std=0.15)
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
        weights[f"encoder.pos_conv.0.{new}"] = weights.pop(f"encoder.pos_conv.0.parametrizations.weight.{old}")
    shapes = {"patch_embedding.weight": (16, 1, 16, 16), "layer_norm.bias": (16,),
              "post_extract_proj.weight": (24, 16), "post_extract_proj.bias": (24,)}
    weights |= {name: 0.15 * torch.randn(shape) for name, shape in shapes.items()}
    weights["layer_norm.weight"] = 1 + 0.15 * torch.randn(16)
    torch.save({"cfg": cfg, "model": weights}, file)


# --- data -----------------------------------------------------------------------------------------


def sound(seconds: float, seed: int) -> np.ndarray:
    """Two tones and some noise, float32 [S] at 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    low, high = random.uniform(100, 500), random.uniform(1000, 4000)
    wave = 0.3 * np.sin(2 * np.pi * low * time) + 0.1 * np.sin(2 * np.pi * high * time * (1 + 0.1 * time))
    return (wave + 0.02 * random.standard_normal(len(time))).astype(np.float32)


def seconds_of(number: int) -> float:
    """Unlike lengths, from 0.31 to 3.7 s."""
    return 0.31 + (number * 7 % 11) * 0.3 + number % 5 * 0.09


def speech_records(count: int, prefix: str = "speech") -> list[Record]:
    """Every third is `language_id`, the rest `asr` with targets of 1 to 11 words."""
    records = []
    for i in range(count):
        if i % 3 == 2:
            records.append(Record(f"{prefix}-{i:02d}", (), "language_id", LANGUAGES[i % 2],
                                  meta={"choices": list(LANGUAGES)}))
        else:
            words = [WORDS[(i * 5 + j) % len(WORDS)] for j in range(1 + i * 7 % 11)]
            records.append(Record(f"{prefix}-{i:02d}", (), "asr", " ".join(words), language="en"))
    return records


def sound_records(count: int, prefix: str = "sound") -> list[Record]:
    """`caption` with two references and `speech_qa` with a question of its own, in turns."""
    records = []
    for i in range(count):
        if i % 2:
            records.append(Record(f"{prefix}-qa-{i:02d}", (), "speech_qa", ("yes", "no")[i // 2 % 2],
                                  question=f"Is the line {WORDS[i]}?",
                                  meta={"choices": ["yes", "no"]}))
        else:
            names = (f"a {WORDS[i % 12]} tone", f"{WORDS[i % 12]} noise that goes {WORDS[(i + 3) % 12]}")
            records.append(Record(f"{prefix}-{i:02d}", (), "caption", references=names))
    return records


def write_set(folder: Path, records: Sequence[Record], per_shard: int = 5,
              encode: Callable[[np.ndarray], np.ndarray] | None = None, info: FeatureInfo | None = None,
              seconds: Iterable[float] = ()) -> ShardIndex:
    """Write records as shards with sounds of unlike lengths; with `encode`, stored features too."""
    folder.mkdir(parents=True)
    lengths = list(seconds) or [seconds_of(i) for i in range(len(records))]
    samples = []
    for i, record in enumerate(records):
        wave = sound(lengths[i], i)
        samples.append(AudioSample(record, wave, encode(wave) if encode else None))
    shards = [write_shard(folder / shard_name(n), samples[start : start + per_shard])
              for n, start in enumerate(range(0, len(samples), per_shard))]
    write_index(folder, [shard for shard in shards if shard], skipped=0, features=info)
    return ShardIndex.load(folder)
