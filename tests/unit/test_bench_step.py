"""tools/bench_step.py: the rivals compute what our step computes, and the whole benchmark runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from listen_dist.data.mixture import SampleRef
from listen_dist.data.shards import FeatureInfo, ShardIndex
from listen_dist.engine.assembly import Parts, assemble
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.step import train_step
from tests import launching, tiny
from tools.step_bench.rivals import PaddedLogMel, TrainerModel, padded_loss, research_step, run_trainer
from tools.step_bench.worlds import made_up_set

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[2]
K = 3


@pytest.fixture(scope="module")
def parts(tiny_world: tiny.Tiny) -> Parts:
    config = tiny_world.config("parallel.llm=replicated", "pool.stochastic_k=false", f"pool.train_k_max={K}",
                               "train.clip_norm=0")
    return assemble(config, torch.device("cpu"))


class Recorder(torch.optim.SGD):
    """Changes nothing; keeps the gradients of each step, one flat copy."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.kept: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.kept.append(torch.cat([grad.flatten().clone() for grad in grads if grad is not None]))


def test_all_three_compute_the_same_on_one_batch(parts: Parts) -> None:
    """Clips of unlike lengths filled up to 30 s and one instruction, so that nothing of the query is padding."""
    config, model = parts.config, parts.model
    reader = replace(parts, log_mel=PaddedLogMel(parts.log_mel)).reader(config.data.train, with_targets=True)
    refs = [SampleRef(0, 0, row) for row in (0, 1, 3, 4)]  # all `asr`
    batch, weight = reader[refs], config.pool.match_weight
    assert len({tuple(row) for row in batch.after_ids}) == 1 < len({len(row) for row in batch.target_ids})
    learned = [p for p in model.trainable.parameters() if p.requires_grad]
    recorder, replicated = Recorder(learned), ReplicatedTrainables(model.trainable)
    result = train_step(model, replicated, recorder, config, 0, 1, [batch], batch)
    (_, out), = result.outputs
    ours = out.token_loss_sum / out.target_tokens + weight * out.match_loss_sum / out.rows
    research = research_step(model, recorder, [batch], K, weight)
    trainer = run_trainer(TrainerModel(model, K, weight), recorder, refs, lambda picked: reader[picked], 4, 1,
                          lambda: None, lambda: None)
    assert research == pytest.approx(float(ours.detach()), rel=1e-5)
    assert trainer == pytest.approx(float(ours.detach()), rel=1e-5)
    expected, of_research, of_trainer = recorder.kept
    torch.testing.assert_close(of_research, expected, rtol=1e-4, atol=1e-6)
    norm = torch.linalg.vector_norm(expected)
    assert norm > 1  # Trainer clips it by default, ours was told not to
    torch.testing.assert_close(of_trainer, expected / norm, rtol=1e-4, atol=1e-6)


def test_padding_changes_what_the_research_code_computes(parts: Parts) -> None:
    """Its query takes silence in; a rival that quietly computed on true lengths would be too fast."""
    refs = [SampleRef(0, 0, row) for row in (0, 1)]
    plain = parts.reader(parts.config.data.train, with_targets=True)[refs]
    padded = replace(parts, log_mel=PaddedLogMel(parts.log_mel)).reader(parts.config.data.train, True)[refs]
    assert padded.audio_lengths.tolist() == [3000, 3000] and plain.audio_lengths.max() < 400
    losses = [padded_loss(parts.model, batch, K, 1.0).item() for batch in (plain, padded)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_made_up_set_has_the_lengths_it_says(tmp_path: Path) -> None:
    entry = made_up_set(tmp_path / "set", 200, factor=0.1)
    index = ShardIndex.load(entry.path)
    assert index.samples == 200 and 1.15 < index.seconds / 200 < 1.39


def test_the_benchmark_runs(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    """The GPU's path with shrunk models: both sets, all ways, ZeRO-3. The set stores another encoder's frames."""
    tiny.write_set(tmp_path / "set", tiny.speech_records(24), info=FeatureInfo("0" * 64, 32, 50),
                   encode=lambda wave: np.zeros((len(wave) // 320, 32), np.float16))
    words = [sys.executable, str(ROOT / "tools/bench_step.py"), f"data.train=[{{path: {tmp_path / 'set'}}}]", "--json",
             "--quick", "--random", "small", "--config", tiny_world.config_file, "--batch-tokens", "4096"]
    output = launching.run(words, 500).check().output
    result, _ = json.JSONDecoder().raw_decode(output[output.index('{\n "machine"') :])
    rows = {(row["set"], row["way"]): row for row in result["rows"]}
    for label in ("config", "made-up"):
        names = {way for at, way in rows if at == label}
        assert {"research", "trainer", "ours", "true lengths off", "token budget off", "target-only logits off",
                "recomputed activations", "ours, 4096 tokens a batch"} <= names
    assert ("made-up", "ZeRO-3, nothing fetched ahead") in rows
    for row in rows.values():
        assert row["clips_per_second"] > 0 and row["clips_per_cpu_second"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1) and min(row["shares"].values()) >= 0
    assert rows["config", "research"]["padding_share"] > 0.5 > rows["config", "ours"]["padding_share"] >= 0
    assert {"over_research", "over_hf_trainer", "made_up_over_research"} <= result["summary"].keys()
