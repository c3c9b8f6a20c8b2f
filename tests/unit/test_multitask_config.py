"""Every shipped configuration takes a step on tiny models; the 7B one has the paper's counts and runs on two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from listen_dist import config as configuration
from listen_dist.data.loader import find_filler, training_steps
from listen_dist.engine.assembly import assemble
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from listen_dist.model_sizes import count
from listen_dist.models.projector import build_projector
from listen_dist.models.prompt_pool import PromptPool
from listen_dist.schema import Config
from listen_dist.structures import LoaderState, Record
from listen_dist.tasks import TASKS
from tests import forking, tiny
from tests.launching import ROOT

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
MULTITASK = ROOT / "configs/multitask_7b.yaml"
LLAMA_7B = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "vocab_size": 32000,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "tie_word_embeddings": False}
WHISPER_LARGE_V2 = {"model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
                    "encoder_ffn_dim": 5120, "num_mel_bins": 80, "decoder_layers": 32}
SETS = {"librispeech": "asr", "covost2": "translation", "iemocap": "emotion", "voxceleb1": "speaker_verification",
        "librisqa": "speech_qa", "clotho": "caption", "audiocaps": "caption"}
"""Task of each data set that tools/prepare has a recipe for."""


def record(task: str, number: int) -> Record:
    words = " ".join(tiny.WORDS[number : number + 1 + number % 4])
    return Record(f"{task}-{number}", (), task, TASKS[task].choices[0] if TASKS[task].choices else words,
                  question="Is it?" if task == "speech_qa" else "")


@pytest.fixture(scope="module")
def sets(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny set of every task, and a BEATs checkpoint beside the tiny models."""
    root = tmp_path_factory.mktemp("sets")
    tiny.build_audio_encoder(tiny_world.audio_encoder)
    for task in TASKS:
        tiny.write_set(root / task, [record(task, number) for number in range(5)])
    return {task: root / task for task in TASKS}


def task_of(path: str) -> str:
    """The task of a shipped path: .../asr/train, .../librisqa1/train."""
    name = path.split("/")[-2]
    return next((task for task in TASKS if name.startswith(task)), None) or next(
        task for known, task in SETS.items() if name.startswith(known))


def shrunk(path: Path, world: tiny.Tiny, sets: dict[str, Path], run_dir: Path) -> list[str]:
    """Overrides that put tiny models and data into a shipped configuration and leave the rest as it is.

    Not compiled: test_compile.py does that, and here it would take longer than all steps together.
    """
    config = configuration.load(path)
    words = [f"model.llm={world.llm}", f"model.speech_encoder={world.encoder}", "model.dtype=float32",
             "model.compile=false", "device=cpu", f"run_dir={run_dir}", "train.max_steps=2", "data.workers=0",
             "data.window=12", "tracking.mlflow=false", "parallel.timeout_minutes=5", "projector.hidden=96"]
    if config.model.audio_encoder:
        words.append(f"model.audio_encoder={world.audio_encoder}")
    return words + [f"data.train[{i}].path={sets[task_of(entry.path)]}" for i, entry in enumerate(config.data.train)]


def one_step(config: Config) -> float:
    """One optimizer step on this process alone; returns its gradient norm."""
    parts = assemble(config, torch.device("cpu"))
    reader = parts.reader(config.data.train, with_targets=True)
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    steps = training_steps(reader, parts.mixture(reader), parts.token_cost(config.pool.k_max), config.data,
                           config.train.seed, 1, 0, 1, LoaderState())
    before = replicated.checksum()
    result = train_step(parts.model.train(), replicated, optimizer, config, 0, 2, next(steps)[0], find_filler(reader))
    assert bool(result.applied) and replicated.checksum() != before and result.outputs
    return float(result.grad_norm)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_config_takes_a_step(path: Path, tiny_world: tiny.Tiny, sets: dict[str, Path],
                                           tmp_path: Path) -> None:
    words = shrunk(path, tiny_world, sets, tmp_path)
    assert one_step(configuration.load(path, [*words, "parallel.llm=replicated"])) > 0


# --- the 7B configuration -------------------------------------------------------------------------


def test_it_is_the_paper_s() -> None:
    config = configuration.load(MULTITASK)
    assert {task_of(entry.path) for entry in config.data.train} == set(SETS.values())
    assert {task_of(entry.path) for entry in config.data.test} == set(SETS.values())
    assert (config.pool.prompts, config.pool.k, config.pool.k_max, config.pool.match_weight) == (50, 20, 20, 1.0)
    train = config.train
    assert (train.learning_rate, train.min_learning_rate, train.warmup_steps) == (3e-5, 1e-5, 3000)
    assert (train.weight_decay, train.beta1, train.beta2) == (0.05, 0.9, 0.999)
    assert config.eval.beams == 4 and config.projector.layers == 2


def test_its_sets_are_what_the_recipes_write() -> None:
    """Each folder is SET/SPLIT of a manifest SET.SPLIT.jsonl."""
    config = configuration.load(MULTITASK)
    for entry in (*config.data.train, *config.data.dev, *config.data.test):
        assert re.fullmatch(r"assets/shards/(librispeech/(train-clean-100|train-clean-360|dev-clean|test-clean|"
                            r"test-other)|(covost2|iemocap_fold[1-5]|voxceleb1|librisqa[12]|clotho|audiocaps)/"
                            r"(train|dev|test))", entry.path), entry.path


def test_its_counts_on_the_meta_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    config = configuration.load(MULTITASK)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        encoder = WhisperEncoder(WhisperConfig.from_dict(WHISPER_LARGE_V2))
        pool = PromptPool(config.pool, torch.empty(llm.config.hidden_size))
        projector = build_projector(config.projector, 1280 + 768, llm.config.hidden_size, 1.0, audio_width=768)
    print(f"\nLLM {count(llm):,}, speech encoder {count(encoder):,}, projector {count(projector):,}, "
          f"pool {count(pool):,}")
    assert count(llm) == 6_738_415_616
    assert count(encoder) == 636_784_640
    assert count(pool) == 2 * 50 * 4096 == 409_600
    assert count(pool) < 1e-4 * count(llm)
    assert count(projector) == qformer_parameters(hidden=768, layers=2, frame=2048, llm=4096)


def qformer_parameters(hidden: int, layers: int, frame: int, llm: int) -> int:
    """Counted by hand: matrices with their biases, norms with gain and bias."""
    attention = 4 * hidden * hidden + 4 * hidden
    cross = 2 * hidden * hidden + 2 * hidden * frame + 4 * hidden
    forward = 8 * hidden * hidden + 5 * hidden
    layer = attention + cross + forward + 3 * 2 * hidden
    return hidden + layers * layer + 2 * frame + (hidden + 1) * llm + 2 * llm


def test_it_trains_two_steps_on_two_ranks(tiny_world: tiny.Tiny, sets: dict[str, Path], tmp_path: Path) -> None:
    """Sharded with checkpointing on two ranks against whole and without it on one: the same losses."""
    losses = {}
    for name, ranks in (("two", 2), ("one", 1)):
        words = ["--config", MULTITASK, *shrunk(MULTITASK, tiny_world, sets, tmp_path / name),
                 "train.batches_per_step=2", "train.warmup_steps=0", "train.learning_rate=1e-2", "train.log_every=1",
                 "parallel.max_live_parameters=1000"]
        if name == "one":
            words += ["parallel.llm=replicated", "model.checkpointing=false"]
        output = forking.run(ranks, "listen_dist.train", words, tmp_path / f"{name}-logs", 400)[0]
        assert "step 2/2 | loss" in output and "audio encoder " in output
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [[json.loads(line)[key] for key in ("loss", "match_loss", "grad_norm")] for line in lines]
    assert len(losses["two"]) == 2 and losses["two"][0] != losses["two"][1]
    for ours, theirs in zip(losses["two"], losses["one"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
