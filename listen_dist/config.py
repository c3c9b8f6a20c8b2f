"""One typed, frozen configuration; the only module that knows OmegaConf.

`load(path, overrides)` merges a YAML file and `key=value` words from the command line
into nested dataclasses and checks them against each other. Nothing is loaded before
that: a wrong key, type or combination ends the program with one line that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import braceexpand
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot be used; the first line names the key and the cure."""


@dataclass(frozen=True)
class ModelConfig:
    llm: str = ""
    """Folder or Hugging Face name of a causal LLM (Llama, Vicuna, Qwen, Mistral …). Stays frozen."""
    speech_encoder: str = ""
    """Folder or Hugging Face name of a Whisper model of any size. Stays frozen."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen weights. Pool and projector are always float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of the LLM. On a CPU with short rows `eager` can be faster."""
    before_audio: str = ""
    """Text between BOS and the audio. May hold special tokens of the LLM's chat format."""
    after_audio: str = "{instruction}"
    """Text between the audio and the target; `{instruction}` is replaced for each clip."""
    seed: int = 0
    """Seed of the initial pool and projector."""
    init_from: str | None = None
    """An export (tools/export.py), checkpoint or run folder whose weights to start from, trained on the same frozen
    models. A run that goes on from a checkpoint of its own doesn't read it."""
    init_projector: bool = True
    """Take the projector too; otherwise the pool alone, which only needs the same LLM."""


@dataclass(frozen=True)
class ProjectorConfig:
    kind: Literal["qformer", "mlp"] = "qformer"
    """`qformer`: one query a window, as in the paper. `mlp`: stacked frames through two layers."""
    window: float = 1 / 3
    """Seconds of audio that become one audio token (windows do not overlap)."""
    hidden: int = 768
    """Width inside: of the Q-Former's layers, or of the MLP's hidden layer."""
    layers: int = 2
    """Q-Former layers (each with cross-attention)."""
    heads: int = 12
    """Attention heads of the Q-Former."""
    start: Literal["random", "least_squares"] = "random"
    """`least_squares`: solve the last layer once, before the first step, so that a window comes out
    near the embedding of the target token spoken then, or of the whole answer (see engine/warm_start.py)."""
    freeze: bool = False
    """Leave only the pool to learn; give `init_from` or `model.init_from` with it."""
    init_from: str | None = None
    """An export, checkpoint or run folder whose projector alone to start from."""


@dataclass(frozen=True)
class PoolConfig:
    selection: Literal["similarity", "attention", "task_static", "fixed", "none"] = "similarity"
    """What stands in front of the input: `similarity`, the best k prompts for each clip (LiSTEN); `attention`, all,
    each times its weight; `task_static`, the part that the clip's task owns and a shared part; `fixed`, all,
    for every clip alike; `none`, nothing (see models/rivals.py)."""
    prompts: int = 50
    """N: prompts in the pool, one value vector each (and one key, where clips choose by keys)."""
    shared_share: float = 0.5
    """`task_static`: share of the pool that all tasks have in common (what cannot be divided evenly comes on top)."""
    tasks: list[str] = field(default_factory=list)
    """`task_static`: the tasks that own a part; default: those of `data.train`."""
    top_k: int | None = None
    """Prompts picked at inference; default ⌊0.4 N⌋."""
    train_k_max: int | None = None
    """Largest k drawn in training; default the same as `top_k`."""
    stochastic_k: bool = True
    """Draw k uniformly from 1 … `train_k_max` for each step; otherwise always `train_k_max`."""
    match_weight: float = 1.0
    """λ, the weight of the match loss."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Which implementation of the top-k matching runs."""

    @property
    def k(self) -> int:
        """k at inference."""
        return self.top_k if self.top_k is not None else max(1, int(0.4 * self.prompts))

    @property
    def k_max(self) -> int:
        """Largest k in training."""
        return self.train_k_max if self.train_k_max is not None else self.k

    def task_parts(self) -> tuple[int, int]:
        """`task_static`: prompts that each task owns, and prompts that all share.

        Raises:
            ConfigError: the pool is too small for so many tasks.
        """
        own = round((1 - self.shared_share) * self.prompts) // len(self.tasks)
        _require(own >= 1, "pool.prompts", self.prompts, f"must be larger, or pool.shared_share = {self.shared_share} "
                 f"smaller, for each of {len(self.tasks)} tasks to own a prompt")
        return own, self.prompts - own * len(self.tasks)


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters put into the frozen LLM; 0: none."""
    alpha: int = 32
    """An adapter's output counts alpha / rank times."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the linear layers that get one, as the LLM calls them."""


@dataclass(frozen=True)
class SetConfig:
    path: str = ""
    """Folder of shards with an index.json (see tools/shard_dataset.py): a path, or an address that begins with
    http://, https://, s3:// or gs://. Braces name several that are read as one set: `part-{00..07}`, `{a,b}`."""
    weight: float = 1.0
    """Share of this set among the samples drawn, relative to the other sets' weights (see `data.temperature`)."""
    max_seconds: float = 0
    """Train on clips up to this length only; longer ones are left out of the plan and not counted as unusable.
    0: no such limit. Start-up reads every sidecar of a set with a limit."""
    max_samples: int = 0
    """Train on so many samples of the set at most (the first of the index); 0: all."""


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to the audio in training, drawn anew each time a clip comes, from its id and its epoch alone.

    All are off by default. They need audio: `data.stored_features` must be false.
    """

    speed: float = 0
    """Play faster or slower by up to this share (0.1: 0.90 … 1.10 in steps of 0.01); the pitch moves along."""
    gain_db: float = 0
    """Louder or softer by up to so many decibels."""
    noise: str = ""
    """Folder of audio files (searched at all depths); a stretch of one is added to each clip."""
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    """Lowest and highest signal-to-noise ratio in decibels, by mean power."""
    reverb: str = ""
    """Folder of room impulse responses (searched at all depths)."""
    reverb_share: float = 0.5
    """Share of the clips that get reverberation, where `reverb` is given."""
    time_masks: int = 0
    """SpecAugment: stretches of the log-mel replaced by its mean."""
    time_mask_seconds: float = 0.4
    """Longest stretch; never more than a fifth of the clip."""
    mel_masks: int = 0
    """SpecAugment: bands of the log-mel replaced by its mean."""
    mel_mask_bins: int = 15
    """Widest band."""

    @property
    def active(self) -> list[str]:
        """The keys that switch something on."""
        return [key for key in ("speed", "gain_db", "noise", "reverb", "time_masks", "mel_masks") if getattr(self, key)]


@dataclass(frozen=True)
class DataConfig:
    train: list[SetConfig] = field(default_factory=list)
    dev: list[SetConfig] = field(default_factory=list)
    test: list[SetConfig] = field(default_factory=list)
    temperature: float | None = None
    """T of p ∝ weight · n^(1/T), n a set's samples: 1 draws in proportion to size, a large one from all sets
    alike. Not given: p ∝ weight."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_tokens: int = 2048
    """Budget of LLM input tokens (padding included) of one micro-batch on one rank."""
    batch_prompts: int | None = None
    """Prompt tokens that each training clip is counted with in that budget; default: as many as it may get.
    Runs with the same number see the same batches, however long their prompts are."""
    window: int = 2048
    """Samples among which neighbours in length are put in one batch. The larger, the less padding."""
    max_target_tokens: int = 256
    """A sample with a longer target is skipped and named."""
    max_seconds: float = 30.0
    """A longer clip is skipped and named."""
    max_bad_fraction: float = 0.1
    """Stop when more than this share of the samples read so far was unusable."""
    workers: int = 0
    """Loader processes a rank; 0: read in the training process."""
    stored_features: bool = True
    """Use the encoder output stored in the shards where they hold it (no encoder run)."""
    cache_dir: str = ""
    """Folder on this node's disk that keeps whole shards of sets read over the network; empty: no cache,
    each sample is fetched by itself. All processes of a node share it."""
    cache_gib: float = 100.0
    """Size limit of the cache (GiB); the shards used longest ago make room for new ones."""
    timeout_seconds: float = 30.0
    """A network source that sends nothing for so long has failed once."""
    retries: int = 8
    """Failures in a row, each after a longer pause (0.5 s to 30 s), before a network source ends the run."""


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = 1000
    max_minutes: float = 0
    """Time for the loop of one start; 0: as long as it takes. Where the time would run out first, the
    number of steps is cut, and the learning rate cools down to the new end."""
    batches_per_step: int = 0
    """Micro-batches of one optimizer step, over all ranks together; 0: one a rank. A fixed
    number gives the same losses on any number of ranks (fewer ranks accumulate)."""
    learning_rate: float = 3e-5
    min_learning_rate: float = 1e-5
    """The rate at the end of the schedule."""
    warmup_steps: int = 3000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.05
    """On matrices of the projector; never on norms, biases or LoRA."""
    decay_pool: bool = False
    """Weight decay on the pool's keys and values too."""
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    seed: int = 0
    """Seed of the data order, of k and of dropout."""
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    """Checkpoints kept (the newest ones)."""
    eval_every: int = 0
    """Steps between two small evaluations of data.dev, which pick the best checkpoints; 0: none."""
    eval_limit: int = 32
    """Samples of each dev set in them; 0: all."""
    checksum_every: int = 100
    """Steps between two proofs that all ranks hold the same trainables."""
    max_skipped_in_a_row: int = 10
    """Stop after so many steps in a row with a non-finite loss or gradient (each is left out on all ranks)."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest checkpoint in `run_dir`, if there is one."""


@dataclass(frozen=True)
class ParallelConfig:
    llm: Literal["full", "node", "replicated"] = "full"
    """`full`: the frozen LLM is sharded over all ranks. `node`: over the ranks of each node, so that no
    weight crosses the network. `replicated`: whole on each."""
    backend: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """What shards the LLM for `full` and `node`: DeepSpeed's ZeRO-3, or PyTorch's fully_shard."""
    node_size: int = 0
    """Ranks of one node, in the launcher's order, for `node`; 0: ranks with the same host name. Set it where
    host names mislead (a container for each rank)."""
    max_live_parameters: int = 30_000_000
    """Gathered LLM parameters held at once (DeepSpeed), beside the layer at work."""
    timeout_minutes: float = 30.0
    """A collective that takes longer ends the run."""
    stuck_minutes: float = 0
    """Without progress for so long, every rank writes its Python stacks and the log names the rank that holds the
    others up; 0: a third of `timeout_minutes`. Give it more than a step takes."""
    health_check: bool = False
    """Measure the bandwidth between every two nodes at the start, to find the slow host."""

    @property
    def stuck_seconds(self) -> float:
        """Seconds without progress until the watchdog speaks."""
        return 60 * (self.stuck_minutes or self.timeout_minutes / 3)


@dataclass(frozen=True)
class EvalConfig:
    splits: list[str] = field(default_factory=lambda: ["test"])
    """Which of data.dev and data.test to score. One: results.json; several: results.<split>.json each."""
    llm: Literal["auto", "whole", "sharded"] = "auto"
    """Under parallel.llm=full: gather the LLM on every rank for the time of decoding (several times faster),
    or leave it sharded. `auto` gathers it where the planner finds room on every rank."""
    choices: Literal["likelihood", "generate"] = "likelihood"
    """Answers out of a closed set (`meta.choices`, or the task's own): the one that the LLM finds most
    likely, or whatever it generates. Where no set is known, answers are always generated."""
    beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    """Above 1: less likely to say a token again. For tasks with free text only; one-word answers go without."""
    batch_tokens: int = 2048
    """Budget of LLM input tokens of one decoding batch."""
    limit: int = 0
    """Decode only so many samples of each set, evenly spread over it; 0: all."""


@dataclass(frozen=True)
class TrackingConfig:
    mlflow: bool = True
    uri: str = ""
    """MLflow tracking address; empty: a SQLite file `mlflow.db` in the folder above `run_dir`."""
    experiment: str = "listen_dist"


@dataclass(frozen=True)
class Config:
    run_dir: str = ""
    """Where checkpoints, logs and results go."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check, and return a frozen Config.

    A file may begin with `base: FILE` (seen from its own folder) and then hold only what differs;
    lists are replaced as a whole.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, contradiction.
    """
    path = Path(path)
    files = _with_bases(path)
    overrides = list(overrides)
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r}: an override has the form key=value, e.g. train.max_steps=50")
    try:
        words = [(word.split("=", 1)[0], OmegaConf.from_dotlist(["value=" + word.split("=", 1)[1]])["value"])
                 for word in overrides]
    except Exception as error:  # PyYAML and OmegaConf raise many types for malformed text
        raise ConfigError(f"command line: not readable as YAML: {error}") from error
    for key, value in words:
        _refuse_unknown_word(key, value)
    source, key = str(path), ""
    try:
        merged = OmegaConf.unsafe_merge(_writable(OmegaConf.structured(Config)), *files)
        _writable(merged)
        source = "command line"
        for key, value in words:
            OmegaConf.update(merged, key, value)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, AssertionError, IndexError, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or key
        raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check(config)
    return config


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[Any]:
    """A YAML file's tree behind those of the files it is based on, the last base first; keys checked."""
    if not path.is_file():
        named = f" (the base of {above[-1]})" if above else " (configs/ holds examples)"
        raise ConfigError(f"{path}: no such config file{named}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML and OmegaConf raise many types for malformed text
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    base = tree.pop("base", None)
    _refuse_unknown_keys(tree, Config, str(path), prefix="")
    if base is None:
        return [OmegaConf.create(tree)]
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"{path}: base: it is based on itself")
    return [*_with_bases(path.parent / str(base), (*above, path)), OmegaConf.create(tree)]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _writable(node: Any) -> Any:
    """Lift the read-only flags that OmegaConf takes over from frozen dataclasses."""
    OmegaConf.set_readonly(node, False)
    for child in (node if OmegaConf.is_list(node) else node.values()):
        if OmegaConf.is_config(child):
            _writable(child)
    return node


def _refuse_unknown_keys(values: dict[Any, Any], schema: type, source: str, prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = nearest(str(full), known_keys())
            raise ConfigError(f"{source}: unknown key {full!r}; the nearest known one is {near!r}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {full}: expected `key: value` lines below it, found {value!r}")
            _refuse_unknown_keys(value, typing.cast(type, inner), source, f"{full}.")
        elif typing.get_origin(inner) is list and isinstance(value, list):
            (item,) = typing.get_args(inner)
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    _refuse_unknown_keys(entry, item, source, f"{full}[{i}].")


def _refuse_unknown_word(key: str, value: Any) -> None:
    """An override's key: `data.train.0.path` and `data.train[0].path` both name a list's entry."""
    known = known_keys()
    if re.sub(r"\.(\d+)(?=\.|$)|\[\d+\]", "[0]", key).removesuffix("[0]") not in known:
        raise ConfigError(f"command line: unknown key {key!r}; the nearest known one is {nearest(key, known)!r}")
    if OmegaConf.is_config(value):
        tree: Any = OmegaConf.to_container(value)
        for part in reversed(re.split(r"[.\[]", key)):
            tree = {part: tree}
        _refuse_unknown_keys(tree, Config, "command line", prefix="")


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys += known_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
            if typing.get_origin(hint) is list:
                keys += known_keys(typing.get_args(hint)[0], f"{prefix}{name}[0].")
    return keys


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`; among dotted keys the last part counts most."""
    def likeness(candidate: str) -> float:
        last = difflib.SequenceMatcher(None, word.split(".")[-1], candidate.split(".")[-1]).ratio()
        return last + 0.5 * difflib.SequenceMatcher(None, word, candidate).ratio()

    return max(known, key=likeness)


def differences(a: Config, b: Config) -> list[str]:
    """Dotted keys at which two configurations differ."""
    return _differences(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _differences(a: Any, b: Any, prefix: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [key for name in a for key in _differences(a[name], b[name], f"{prefix}.{name}" if prefix else name)]
    return [] if a == b else [prefix]


AT_LEAST = {
    "lora.rank": 0, "pool.prompts": 1, "projector.window": 0.02, "projector.hidden": 1, "projector.layers": 1,
    "projector.heads": 1,
    "train.max_steps": 1, "train.log_every": 1, "train.save_every": 1, "train.keep": 1, "train.checksum_every": 1,
    "train.eval_every": 0, "train.eval_limit": 0, "train.batches_per_step": 0, "train.max_minutes": 0,
    "train.warmup_steps": 0, "train.weight_decay": 0, "train.max_skipped_in_a_row": 1,
    "train.clip_norm": 0, "train.min_learning_rate": 0, "data.batch_tokens": 32, "data.window": 1, "data.workers": 0,
    "data.max_target_tokens": 2, "data.max_bad_fraction": 0, "data.retries": 0,
    "parallel.max_live_parameters": 0, "parallel.node_size": 0,
    "data.augment.gain_db": 0, "data.augment.time_masks": 0, "data.augment.mel_masks": 0,
    "data.augment.time_mask_seconds": 0, "data.augment.mel_mask_bins": 0, "eval.beams": 1,
    "eval.batch_tokens": 32, "eval.limit": 0,
}
"""Smallest values (a projector window: one frame; a target: one token and EOS)."""


def check(config: Config) -> None:
    """Cross-field checks; no file is opened and no weight loaded.

    Raises:
        ConfigError: naming the key, its value and what would be right.
    """
    pool, train, data, projector = config.pool, config.train, config.data, config.projector
    for key, value in (("run_dir", config.run_dir), ("model.llm", config.model.llm),
                       ("model.speech_encoder", config.model.speech_encoder)):
        _require(bool(value), key, value, "must be set")
    for key, least in AT_LEAST.items():
        number: Any = functools.reduce(getattr, key.split("."), config)
        _require(number >= least, key, number, f"must be at least {least}")
    _require(1 <= pool.k <= pool.prompts, "pool.top_k", pool.k, f"must be 1 … pool.prompts = {pool.prompts}")
    _require(1 <= pool.k_max <= pool.prompts, "pool.train_k_max", pool.k_max,
             f"must be 1 … pool.prompts = {pool.prompts}")
    _require(0 <= pool.shared_share < 1, "pool.shared_share", pool.shared_share, "must be within 0 … 1, 1 excluded")
    if pool.selection == "task_static" and pool.tasks:
        pool.task_parts()
    _require(data.batch_prompts is None or data.batch_prompts >= 0, "data.batch_prompts", data.batch_prompts,
             "must be at least 0")
    _require(bool(config.lora.targets), "lora.targets", config.lora.targets, "must name a layer, e.g. [q_proj, v_proj]")
    _require(not (projector.freeze and pool.selection == "none" and not config.lora.rank), "projector.freeze", True,
             "with pool.selection = 'none' and no LoRA leaves nothing to learn")
    _require(projector.kind == "mlp" or projector.hidden % projector.heads == 0, "projector.hidden",
             projector.hidden, f"must be a multiple of projector.heads = {projector.heads}")
    from_model = config.model.init_from is not None and config.model.init_projector
    loaded_by = "model.init_from" if from_model else "projector.init_from"
    loads_projector = from_model or projector.init_from is not None
    _require(not projector.freeze or loads_projector, "projector.freeze", True,
             "needs projector.init_from or model.init_from: a frozen random projector cannot learn")
    _require(not loads_projector or projector.start == "random", "projector.start", projector.start,
             f"would overwrite what {loaded_by} loads; give one of the two")
    _require(not from_model or projector.init_from is None, "projector.init_from", projector.init_from,
             "model.init_from brings a projector too; set model.init_projector=false, or give one of the two")
    _require("{instruction}" in config.model.after_audio, "model.after_audio", config.model.after_audio,
             "must hold {instruction}, else every task gets the same question")
    for key, beta in (("train.beta1", train.beta1), ("train.beta2", train.beta2)):
        _require(0 <= beta < 1, key, beta, "must be within 0 … 1, 1 excluded")
    _require(train.learning_rate > 0, "train.learning_rate", train.learning_rate, "must be positive")
    _require(train.min_learning_rate <= train.learning_rate, "train.min_learning_rate", train.min_learning_rate,
             f"is above train.learning_rate = {train.learning_rate}")
    _require(train.eval_every == 0 or bool(data.dev), "train.eval_every", train.eval_every, "needs sets in data.dev")
    _require(0 < data.max_seconds <= 30, "data.max_seconds", data.max_seconds,
             "must be within the encoder's window of 30 s")
    for split in ("train", "dev", "test"):
        for i, entry in enumerate(getattr(data, split)):
            _require(bool(entry.path), f"data.{split}[{i}].path", entry.path, "must be set")
            set_addresses(entry.path, f"data.{split}[{i}].path")
            _require(entry.weight > 0, f"data.{split}[{i}].weight", entry.weight, "must be positive")
            for key, limit in (("max_seconds", entry.max_seconds), ("max_samples", entry.max_samples)):
                _require(limit >= 0, f"data.{split}[{i}].{key}", limit, "must be at least 0 (no limit)")
                _require(split == "train" or not limit, f"data.{split}[{i}].{key}", limit,
                         "only training leaves samples out; evaluation has eval.limit")
    _require(data.temperature is None or data.temperature > 0, "data.temperature", data.temperature,
             "must be positive; 1 draws in proportion to size, large values from all sets alike")
    _check_augment(data)
    splits = config.eval.splits
    _require(bool(splits) and len(set(splits)) == len(splits) and set(splits) <= {"dev", "test"}, "eval.splits",
             splits, "must be [dev], [test] or [dev,test]")
    _require(config.eval.length_penalty == 1 or config.eval.beams > 1, "eval.length_penalty",
             config.eval.length_penalty, "needs eval.beams above 1; greedy decoding compares no lengths")
    _require(config.eval.repetition_penalty > 0, "eval.repetition_penalty", config.eval.repetition_penalty,
             "must be positive (1: none)")
    _require(data.cache_gib > 0, "data.cache_gib", data.cache_gib, "must be positive")
    _require(data.timeout_seconds > 0, "data.timeout_seconds", data.timeout_seconds, "must be positive")
    parallel = config.parallel
    _require(parallel.timeout_minutes > 0, "parallel.timeout_minutes", parallel.timeout_minutes, "must be positive")
    _require(0 <= parallel.stuck_minutes < parallel.timeout_minutes, "parallel.stuck_minutes", parallel.stuck_minutes,
             f"must be below parallel.timeout_minutes = {parallel.timeout_minutes}, 0 or more")


def _check_augment(data: DataConfig) -> None:
    augment, where = data.augment, "data.augment."
    keys = ", ".join(where + key for key in augment.active)
    _require(not (keys and data.stored_features), keys, True,
             "works on audio, which stored encoder frames no longer are; set data.stored_features=false")
    _require(0 <= augment.speed <= 0.5, where + "speed", augment.speed, "must be within 0 … 0.5")
    _require(0 <= augment.reverb_share <= 1, where + "reverb_share", augment.reverb_share, "must be within 0 … 1")
    snr = augment.noise_snr_db
    _require(len(snr) == 2 and snr[0] <= snr[1], where + "noise_snr_db", snr, "must be [lowest, highest]")


def set_addresses(path: str, key: str = "path") -> list[str]:
    """The folders that a set's path names: braces expanded, in that order.

    Raises:
        ConfigError: naming `key`, where an address is none that we read.
    """
    try:
        addresses = list(braceexpand.braceexpand(path, escape=False))
    except ValueError:
        raise ConfigError(f"{key} = {path!r}: a brace without its pair") from None
    _require(len(set(addresses)) == len(addresses), key, path, "names a folder twice")
    for address in addresses:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
        if scheme:
            _require(re.match(r"(https?|s3|gs)://[^/]", address) is not None, key, path,
                     f"{scheme[0]!r} is no source; give a folder, or an address that begins with http://, https://, "
                     "s3:// or gs:// (a folder whose name holds a colon: ./name)")
            _require(re.search(r"[@?#]", address) is None, key, path, "an address holds no password (those belong "
                     "into ~/.netrc or the store's environment), no '?' and no '#'")
    return addresses


def _require(holds: bool, key: str, value: object, what: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {value!r}: {what}")
