"""Real ranks in every layout, run once, and the plain process that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from listen_dist.data.features import LogMel
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.models.encoders import load_speech_encoder
from listen_dist.models.llm import DTYPES, load_tokenizer
from tests import forking, plain, tiny
from tests.distributed.scenarios import MICRO_BATCHES, TASK_WEIGHTS, Ranks, scenarios

Reference = Callable[[dict[str, Tensor], list[plain.Clip], int, str], list[plain.Outcome]]


@pytest.fixture(scope="package")
def ranks(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Ranks]:
    """All scenarios, run once: one launch for each number of ranks, one process group for all layouts in it."""
    folder = tmp_path_factory.mktemp("ranks")
    found = scenarios(folder)

    def launch(world: int) -> None:
        words = (one.words for one in found if one.world == world)
        forking.run(world, "tests.distributed.gradient_worker", [tiny_world.config_file, folder, *words],
                    folder / f"{world}-logs", 1200)

    with ThreadPoolExecutor() as pool:
        list(pool.map(launch, MICRO_BATCHES))
    return found


@pytest.fixture(scope="package")
def clips(tiny_world: tiny.Tiny) -> dict[str, plain.Clip]:
    """All training clips by id, each prepared alone."""
    config = tiny_world.config()
    text = TextEncoder(load_tokenizer(config.model.llm), config.model)
    encoder = load_speech_encoder(config.model.speech_encoder, torch.float32)
    log_mel = LogMel.from_pretrained(config.model.speech_encoder)
    found = {}
    for entry in config.data.train:
        index = ShardIndex.load(entry.path)
        for shard, row in ((s, r) for s, listed in enumerate(index.shards) for r in range(listed.samples)):
            sample = index.read_sample(shard, row)
            assert sample.waveform is not None
            found[sample.record.id] = plain.Clip(
                encoder.encode([log_mel(sample.waveform)])[0], text.after_ids(sample.record),
                text.target_ids(sample.record.answers[0]), TASK_WEIGHTS.get(sample.record.task, 1.0))
    return found


@pytest.fixture(scope="package")
def reference(tiny_world: tiny.Tiny) -> Reference:
    """The plain process: weights, clips, k and dtype to outcomes."""
    config = tiny_world.config()
    llms = {name: AutoModelForCausalLM.from_pretrained(config.model.llm, dtype=dtype).eval().requires_grad_(False)
            for name, dtype in DTYPES.items()}
    frame = TextEncoder(load_tokenizer(config.model.llm), config.model).frame

    def outcomes(weights: dict[str, Tensor], batch: list[plain.Clip], k: int, dtype: str) -> list[plain.Outcome]:
        return [plain.run_clip(llms[dtype], weights, clip, frame, 5, k) for clip in batch]

    return outcomes
