"""Every key of a configuration, as nested frozen dataclasses; config.py reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from listen_dist.errors import ListenError


class ConfigError(ListenError):
    """A configuration that cannot be used; the first line names the key and the cure."""


PATH = "path"
PathText = Annotated[str, PATH]
"""A file, folder or address: `~` and environment variables are expanded (yaml_text.py)."""


def require(holds: bool, key: str, value: object, what: str) -> None:
    """Refuse `key` = `value` with the reason unless it holds."""
    if not holds:
        raise ConfigError(f"{key} = {value!r}: {what}")


@dataclass(frozen=True)
class ModelConfig:
    llm: PathText = ""
    """Folder or Hugging Face name of a causal LLM (Llama, Vicuna, Qwen, Mistral …). Stays frozen."""
    speech_encoder: PathText = ""
    """Folder or Hugging Face name of a Whisper model of any size. Stays frozen."""
    audio_encoder: PathText = ""
    """A BEATs checkpoint (`.pt` from its authors) whose frames stand beside the speech encoder's, for sounds that
    are not speech. Stays frozen. Empty: none."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the LLM's weights. Encoders, pool and projector are float32; in training steps without stored frames
    the encoders compute in this type."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention of the LLM. On a CPU with short rows `eager` can be faster."""
    checkpointing: bool = False
    """Keep only the input of each LLM layer for the backward pass and compute the rest anew: far less memory for
    activations, about a third more computation (and gathering) a step. The gradients are the same."""
    compile: bool = False
    """`torch.compile` over each LLM layer in training: fewer, fused operations after half a minute at the start.
    For parallel.llm=replicated. On a CPU it needs a C++ compiler."""
    before_audio: str = ""
    """Text between BOS and the audio. May hold special tokens of the LLM's chat format."""
    after_audio: str = "{instruction}"
    """Text between the audio and the target; `{instruction}` is replaced for each clip."""
    seed: int = 0
    """Seed of the initial pool and projector."""
    init_from: PathText | None = None
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
    init_from: PathText | None = None
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
    query: Literal["raw", "centred"] = "raw"
    """What keys are matched against. `raw`: the mean over the wrapped input, as in the paper. `centred`: that
    without what all inputs have in common, by running statistics of the training queries, and without a gradient
    to the projector; the choice then varies with the clip (see `models.prompt_pool.CentredPool`)."""
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
        require(own >= 1, "pool.prompts", self.prompts, f"must be larger, or pool.shared_share = {self.shared_share} "
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
    path: PathText = ""
    """Folder of shards with an index.json (see tools/shard_dataset.py): a path, or an address that begins with
    http://, https://, s3:// or gs://. Braces name several that are read as one set: `part-{00..07}`, `{a,b}`."""
    weight: float = 1.0
    """Share of this set among the samples drawn, relative to the other sets' weights (see `data.temperature`)."""
    max_seconds: float = 0
    """Train on clips up to this length only; longer ones are left out of the plan and not counted as unusable.
    0: no such limit. Start-up reads every sidecar of a set with a limit."""
    max_samples: int = 0
    """Train on so many samples of the set at most (the first of the index); 0: all."""
    task: str = ""
    """Train on this task's samples only, of a set that holds several; empty: on all. Reads all sidecars too."""


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to the audio in training, drawn anew each time a clip comes, from its id and its epoch alone.

    All are off by default. They need audio: `data.stored_features` must be false.
    """

    speed: float = 0
    """Play faster or slower by up to this share (0.1: 0.90 … 1.10 in steps of 0.01); the pitch moves along."""
    gain_db: float = 0
    """Louder or softer by up to so many decibels."""
    noise: PathText = ""
    """Folder of audio files (searched at all depths), or shards as in `data.train[i].path`; a stretch of one sound
    is added to each clip."""
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    """Lowest and highest signal-to-noise ratio in decibels, by mean power."""
    reverb: PathText = ""
    """Room impulse responses: a folder of audio files (searched at all depths), or shards."""
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
    """Sets to train on, mixed by their weights."""
    dev: list[SetConfig] = field(default_factory=list)
    """Sets for the small evaluations of `train.eval_every`, and for `eval.splits=[dev]`."""
    test: list[SetConfig] = field(default_factory=list)
    """Sets for the final scores (`eval.splits=[test]`)."""
    temperature: float | None = None
    """T of p ∝ weight · n^(1/T), n a set's samples: 1 draws in proportion to size, a large one from all sets
    alike. Not given: p ∝ weight."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_tokens: int = 2048
    """Budget of LLM input tokens (padding included) of one micro-batch on one rank."""
    batch_prompts: int | None = None
    """Prompt tokens that each training clip is counted with in that budget; default: as many as it may get.
    Runs with the same number see the same batches, however long their prompts are."""
    window: int = 4096
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
    """Use the encoder output stored in the shards where all sets hold it (no encoder run)."""
    cache_dir: PathText = ""
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
    """Optimizer steps of the whole run, those before a restart included."""
    max_minutes: float = 0
    """Time for the loop of one start; 0: as long as it takes. Where the time would run out first, the
    number of steps is cut, and the learning rate cools down to the new end."""
    batches_per_step: int = 0
    """Micro-batches of one optimizer step, over all ranks together; 0: one a rank. A fixed
    number gives the same losses on any number of ranks (fewer ranks accumulate)."""
    learning_rate: float = 3e-5
    """The highest rate, reached when the warm-up is over."""
    min_learning_rate: float = 1e-5
    """The rate at the end of the schedule."""
    warmup_steps: int = 3000
    """Steps in which the rate rises to `learning_rate`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls from there to `min_learning_rate` by the last step; `constant`: not at all."""
    weight_decay: float = 0.05
    """On matrices of the projector; never on norms, biases or LoRA."""
    decay_pool: bool = False
    """Weight decay on the pool's keys and values too."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient, for each step."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """How often a target token counts in the loss, by task; tasks not named: once. Answers of two tokens among
    transcripts of twenty are a few hundredths of a mean over tokens; a weight makes such a task heard."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    seed: int = 0
    """Seed of the data order, of k and of dropout."""
    log_every: int = 10
    """Steps between two lines of the log and of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints."""
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
    """`auto`: go on from the newest checkpoint in `run_dir`, if there is one. `never`: refuse such a folder."""


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
    others up; 0: a third of `timeout_minutes`. Give it more than a step or
    an evaluation of data.dev takes."""
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
    """Under parallel.llm=full or node: gather the LLM on every rank for the time of decoding (several times faster),
    or leave it sharded. `auto` gathers it where the planner finds room on every rank."""
    choices: Literal["likelihood", "generate"] = "likelihood"
    """Answers out of a closed set (`meta.choices`, or the task's own): the one that the LLM finds most
    likely, or whatever it generates. Where no set is known, answers are always generated."""
    beams: int = 1
    """Beams of the search for free text; 1: greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's log probability is divided by: above 0 longer answers win more often."""
    repetition_penalty: float = 1.0
    """Above 1: less likely to say a token again. For tasks with free text only; one-word answers go without."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice in an answer, which ends a loop; 0: anything may. Free text only, too."""
    batch_tokens: int = 2048
    """Budget of LLM input tokens of one decoding batch."""
    limit: int = 0
    """Decode only so many samples of each set, evenly spread over it; 0: all."""
    report: bool = True
    """Open the pool after scoring: report/report.html beside results.json, and its figures in MLflow."""


@dataclass(frozen=True)
class TrackingConfig:
    mlflow: bool = True
    """Log to MLflow beside metrics.jsonl."""
    uri: PathText = ""
    """MLflow tracking address; empty: a SQLite file `mlflow.db` in the folder above `run_dir`."""
    experiment: str = "listen_dist"
    """MLflow experiment that the run is put in."""


@dataclass(frozen=True)
class Config:
    run_dir: PathText = ""
    """Where checkpoints, logs and results go."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU."""
    model: ModelConfig = field(default_factory=ModelConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
