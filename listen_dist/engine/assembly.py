"""From a configuration to the parts of a run: tokenizer, encoder, sharded LLM, trainables."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from listen_dist import dist
from listen_dist.data.augment import Augmenter
from listen_dist.data.features import Fbank, LogMel
from listen_dist.data.loader import BatchReader
from listen_dist.data.mixture import Mixture
from listen_dist.data.schedule import TokenCost
from listen_dist.data.shards import FEATURES_VERSION, ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.data.text_cost import learn_text_tokens
from listen_dist.engine.sharding import Sharding, sharding_for
from listen_dist.models import families
from listen_dist.models.beats import load_audio_encoder
from listen_dist.models.encoders import load_speech_encoder
from listen_dist.models.listen import Listen
from listen_dist.models.llm import CompiledLayers, embedding_stats, load_llm, load_tokenizer
from listen_dist.models.lora import add_lora
from listen_dist.models.projector import build_projector
from listen_dist.models.rivals import TaskPool, build_pool
from listen_dist.schema import Config, ConfigError, SetConfig
from listen_dist.structures import ENCODER_RATE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What training, evaluation and inference all need."""

    config: Config
    model: Listen
    sharding: Sharding
    text: TextEncoder
    log_mel: LogMel

    def reader(self, sets: Sequence[SetConfig], with_targets: bool) -> BatchReader:
        """Open the shard sets and check their stored features against the encoder.

        Raises:
            ShardError: an index or shard is missing or damaged.
            ConfigError: stored features of another encoder.
            ListenError: a task that owns no prompts (`pool.selection = task_static`).
        """
        indexes = [ShardIndex.load(entry.path, self.config.data) for entry in sets]
        for index in indexes:
            if isinstance(self.model.pool, TaskPool):
                for task in index.tasks:
                    self.model.pool.place(task)
            self._check_features(index)
        data = self.config.data
        augment = with_targets and data.augment.active
        augmenter = Augmenter(data.augment, self.config.train.seed, data.max_seconds, data) if augment else None
        fbank = Fbank() if self.config.model.audio_encoder else None
        return BatchReader(indexes, self.log_mel, self.text, data, with_targets, augmenter, fbank)

    def _check_features(self, index: ShardIndex) -> None:
        model, config = self.model, self.config.model
        used = [("speech_encoder", config.speech_encoder, model.encoder, index.features),
                ("audio_encoder", config.audio_encoder, model.audio_encoder, index.audio_features)]
        for key, path, encoder, stored in used:
            if self.config.data.stored_features and stored and encoder and stored.fingerprint != encoder.fingerprint:
                raise ConfigError(f"{index.folder}: its stored features come from another encoder than "
                                  f"model.{key} = {path!r}; write the shards anew, or set data.stored_features=false")
            if self.config.data.stored_features and stored and stored.version != FEATURES_VERSION:
                _name_other_version(str(index.folder))

    def mixture(self, reader: BatchReader) -> Mixture:
        """The training sets, mixed as the config says."""
        config = self.config
        return Mixture(reader.indexes, config.data.train, config.train.seed, config.data.temperature)

    def token_cost(self, k: int) -> TokenCost:
        """Tokens that a clip takes in the LLM where k prompts are asked for."""
        return self._cost(self.model.pool.prompt_tokens(k))

    def training_cost(self, reader: BatchReader) -> TokenCost:
        """The same for the sets of training: with the longest prompt, or what `data.batch_prompts` says."""
        counted = self.config.data.batch_prompts
        cost = self.token_cost(self.config.pool.k_max) if counted is None else self._cost(counted)
        # One rank reads and tells the others: all must plan alike, and a bad disk is one rank's alone.
        return replace(cost, text=dist.on_main(lambda: tuple(
            learn_text_tokens(index, self.text) for index in reader.indexes)))

    def _cost(self, prompts: int) -> TokenCost:
        frame = self.text.frame
        return TokenCost(prompts + len(frame.bos) + len(frame.before) + self.text.fixed_after + 1,
                         ENCODER_RATE / self.model.projector.window_frames)


@lru_cache  # once for each folder
def _name_other_version(folder: str) -> None:
    logger.warning("%s: its stored frames were made by another version of tools/shard_dataset.py than this one: "
                   "answers may differ from those about the audio itself, and of an older version frames may be wrong "
                   "(docs/data.md, Older shards). Write them anew, or set data.stored_features=false", folder)


def with_pool_tasks(config: Config) -> Config:
    """The config with `pool.tasks` filled in from the training sets, where `task_static` needs it.

    Raises:
        ConfigError: the pool is too small for so many tasks.
        ShardError: a training set is missing; give pool.tasks then.
    """
    if config.pool.selection != "task_static" or config.pool.tasks:
        return config
    tasks = sorted({task for entry in config.data.train for task in ShardIndex.load(entry.path).tasks})
    if not tasks:
        raise ConfigError("pool.tasks = []: task_static needs the tasks, and data.train names no set to take them from")
    resolved = replace(config, pool=replace(config.pool, tasks=tasks))
    resolved.pool.task_parts()
    return resolved


def assemble(config: Config, device: torch.device) -> Parts:
    """Load the frozen models, lay the LLM out over the ranks, build the trainables on top.

    The trainables come out the same on every rank: they are made on the CPU from
    `model.seed` and from the LLM's embeddings.
    """
    # On Hopper and newer torch would take cuDNN's attention. With a mask its gradients can be NaN for some lengths
    # (pytorch issue 196678), and it plans anew for every shape, where nearly every batch has another.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = with_pool_tasks(config)
    tokenizer = load_tokenizer(config.model.llm)
    text = TextEncoder(tokenizer, config.model)
    # In fp32 whatever the LLM's type, as the frames in shards: bf16 would round otherwise on each processor.
    encoder = load_speech_encoder(config.model.speech_encoder, torch.float32).to(device)
    log_mel = LogMel.from_pretrained(config.model.speech_encoder)
    if log_mel.mels != encoder.mels:
        raise ConfigError(f"model.speech_encoder = {config.model.speech_encoder!r}: its config.json says "
                          f"{encoder.mels} mel bins (num_mel_bins), its preprocessor_config.json {log_mel.mels} "
                          "(feature_size); they belong to different models: take both files from the same one")
    sounds = config.model.audio_encoder
    audio_encoder = load_audio_encoder(sounds, torch.float32).to(device) if sounds else None
    sharding = sharding_for(config)
    llm = sharding.load(lambda: load_llm(config.model), device)
    embedding = families.embedding_of(llm)
    frame = text.frame
    families.check_tokens(llm, config.model.llm, [*frame.bos, *frame.before], frame.eos)
    if frame.pad >= embedding.num_embeddings:  # it only fills up answers behind their EOS
        frame = replace(frame, pad=frame.eos)
    families.probe(llm, config.model.llm, device)
    if config.eval.beams > 1:
        families.check_beams(llm)
    stats = embedding_stats(embedding)
    torch.manual_seed(dist.derived_seed("model", config.model.seed))
    pool = build_pool(config.pool, stats.mean)
    audio_width = audio_encoder.width if audio_encoder else 0
    projector = build_projector(config.projector, encoder.width + audio_width, embedding.embedding_dim, stats.std,
                                audio_width)
    projector.requires_grad_(not config.projector.freeze)
    # After the layout, so that no rank shards the adapters.
    lora = add_lora(llm, config.lora, device) if config.lora.rank else None
    compiled = CompiledLayers(llm) if config.model.compile else None
    model = Listen(llm, encoder, projector.to(device), pool.to(device), frame, lora, audio_encoder, compiled)
    return Parts(config, model, sharding, text, log_mel)
