"""The planner against what two real ranks hold and use, against real modules' counts, and as a command."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from listen_dist import config as configuration
from listen_dist import model_sizes, planner
from listen_dist.model_sizes import count, llm_size, projector_size, sizes_of, whisper_size
from listen_dist.models.beats import implementation
from listen_dist.models.projector import build_projector
from listen_dist.planner import GIB, Cluster, MemoryPlan, Shape, cures, plan_memory, plan_step
from listen_dist.schema import Config, ProjectorConfig
from tests import launching, tiny
from tests.launching import ROOT

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

MULTITASK = ROOT / "configs/multitask_7b.yaml"


# --- two real ranks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What two ranks wrote down."""

    config: Config
    ranks: list[dict[str, Any]]
    grads: list[dict[str, torch.Tensor]]

    def plan(self, recomputed: bool, shape: Shape | None = None) -> MemoryPlan:
        config = replace(self.config, model=replace(self.config.model, checkpointing=recomputed))
        ranks = len(self.ranks)
        return plan_memory(config, sizes_of(config), Cluster(ranks, ranks), config.parallel.llm, shape)


@pytest.fixture(scope="module")
def measured(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Sharded over two ranks on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):  # else glibc keeps what was freed
            patch.setenv(name, "262144")
        return measure(tiny_world, tmp_path_factory.mktemp("planner"), 2, "cpu", "full")


def measure(tiny_world: tiny.Tiny, folder: Path, ranks: int, device: str, layout: str) -> Measured:
    """A random Llama of 55 M parameters in bf16; one step of 24 clips."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=8_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )).to(torch.bfloat16).save_pretrained(folder / "llm")
    tree = tiny.config_tree(tiny_world)
    tree["model"] |= {"llm": str(folder / "llm"), "dtype": "bfloat16", "checkpointing": True}
    tree["device"] = device
    tree["parallel"] |= {"llm": layout, "max_live_parameters": 4_000_000, "timeout_minutes": 10.0}
    # So small a rate that nothing moves: every step is the same.
    tree["train"] |= {"learning_rate": 1e-30, "min_learning_rate": 1e-30, "weight_decay": 0.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    tree["model"]["llm"] = str(tiny_world.llm)
    (warm := folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    launching.run_ranks(ranks, "tests.distributed.planner_worker", [folder / "config.yaml", warm, folder], folder, 850)
    return Measured(configuration.load(folder / "config.yaml"),
                    [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(ranks)],
                    [load_file(folder / f"grads-{rank}.safetensors") for rank in range(ranks)])


def test_sharded_bytes_are_exact(measured: Measured) -> None:
    for rank in measured.ranks:
        assert rank["held"] == measured.plan(True).llm_held


@pytest.mark.parametrize("name, share", [("kept", 0.75), ("recomputed", 0.55)])
def test_the_peak_of_a_step_is_within_the_plan(measured: Measured, name: str, share: float) -> None:
    """At most the plan, and not far below: that adds up the most weights that may be gathered and the most that a
    layer's backward pass takes, which hardly meet since weights are let go layer by layer."""
    for rank, plan in compared(measured, name):
        assert share * plan.total < rank[name]["peak"] < 1.05 * plan.total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_peak_on_a_gpu_is_within_10_percent(tiny_world: tiny.Tiny, tmp_path: Path) -> None:
    found = measure(tiny_world, tmp_path, 1, "cuda", "replicated")
    assert found.ranks[0]["held"] == found.plan(True).llm_held
    for name in ("kept", "recomputed"):
        for rank, plan in compared(found, name):
            assert rank[name]["peak"] == pytest.approx(plan.total, rel=0.10)


def compared(measured: Measured, name: str) -> list[tuple[dict[str, Any], MemoryPlan]]:
    """What each rank measured, and what the planner says for the shape of its step."""
    plans = [measured.plan(name == "recomputed", Shape(**rank[name]["shape"])) for rank in measured.ranks]
    for rank, plan in zip(measured.ranks, plans, strict=True):
        print(f"\n{name}: measured {rank[name]['peak'] / 2**20:.0f} MiB, planned {plan.total / 2**20:.0f} MiB\n"
              + "\n".join(plan.lines()), rank[name]["shape"])
    return list(zip(measured.ranks, plans, strict=True))


def test_recomputing_saves_memory_and_changes_no_gradient(measured: Measured) -> None:
    for rank, grads in zip(measured.ranks, measured.grads, strict=True):
        assert rank["recomputed"]["peak"] < rank["kept"]["peak"]
        assert grads["kept"].any()
        torch.testing.assert_close(grads["recomputed"], grads["kept"], rtol=1e-6, atol=0)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qformer", "mlp"])
def test_projectors_are_counted_right(kind: str) -> None:
    config = ProjectorConfig(kind, window=0.2, hidden=24, heads=4, layers=3)  # type: ignore[arg-type]
    assert projector_size(config, 40, 56) == count(build_projector(config, 40, 56, 1.0, audio_width=10))


def test_encoders_are_counted_right(tmp_path: Path) -> None:
    config = WhisperConfig(d_model=48, encoder_layers=3, encoder_ffn_dim=100, encoder_attention_heads=4,
                           num_mel_bins=128)
    config.save_pretrained(tmp_path)
    assert whisper_size(str(tmp_path)) == (count(WhisperEncoder(config)), 48)
    sizes = implementation().BEATsConfig({"relative_position_embedding": True, "gru_rel_pos": True, "deep_norm": True})
    transformer = implementation().TransformerEncoder(sizes)
    patches = 512 * 16 * 16 + 2 * 512 + 513 * 768
    assert count(transformer) + patches == model_sizes.BEATS_PARAMETERS


def test_an_llm_with_a_tied_head_and_grouped_queries(tiny_world: tiny.Tiny) -> None:
    size = llm_size(str(tiny_world.llm))
    model = LlamaForCausalLM.from_pretrained(tiny_world.llm)
    assert size.parameters == count(model) and size.layer == count(model.model.layers[0])
    assert (size.layers, size.width, size.inner, size.attention_width, size.heads) == (3, 64, 192, 64, 4)
    assert size.largest == max(p.numel() for p in model.parameters()) == model.get_input_embeddings().weight.numel()


# --- the 7B configuration, in closed form ---------------------------------------------------------


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name folders with nothing but the config.json of Llama-7B and Whisper-large-v2."""
    folder = tmp_path_factory.mktemp("seven")
    LlamaConfig().save_pretrained(folder / "llm")  # its defaults are Llama-7B
    WhisperConfig(d_model=1280, encoder_layers=32, encoder_ffn_dim=5120, encoder_attention_heads=20,
                  num_mel_bins=80).save_pretrained(folder / "whisper")
    return [f"model.llm={folder / 'llm'}", f"model.speech_encoder={folder / 'whisper'}"]


@pytest.fixture(scope="module")
def config(seven: list[str]) -> Config:
    return configuration.load(MULTITASK, seven)


@pytest.fixture(scope="module")
def sizes(config: Config) -> planner.Sizes:
    return sizes_of(config)


def test_a_7b_is_sharded_and_gathered(config: Config, sizes: planner.Sizes) -> None:
    cluster = Cluster(64, 8)
    plans = {layout: plan_memory(config, sizes, cluster, layout) for layout in planner.LAYOUTS}
    weights = 2 * 6_738_415_616
    assert sizes.pool == 409_600 and plans["replicated"].llm_held == weights
    assert plans["node"].llm_held == weights // 8 and plans["full"].llm_held == weights // 64
    assert plans["full"].trainables == 20 * (sizes.pool + sizes.projector)
    assert plans["replicated"].llm_gathered == 0 and plans["full"].llm_gathered < weights // 10
    kept = plan_memory(replace(config, model=replace(config.model, checkpointing=False)), sizes, cluster, "full")
    assert kept.activations > 5 * plans["full"].activations


def test_traffic_in_closed_form(config: Config, sizes: planner.Sizes) -> None:
    weights, learned = 2 * 6_738_415_616, 4 * (sizes.pool + sizes.projector)
    cluster = Cluster(64, 8)
    full, node, whole = (plan_step(config, sizes, cluster, layout) for layout in planner.LAYOUTS)
    reduced = 2 * learned * 63 / 64
    assert full.gathers == node.gathers == 2 and whole.gathers == 0
    assert full.in_node == full.in_rank == pytest.approx(2 * weights * 63 / 64 + reduced)
    assert node.in_rank == pytest.approx(2 * weights * 7 / 8 + reduced)
    assert node.in_node == whole.in_node == whole.in_rank == pytest.approx(reduced)
    assert plan_step(config, sizes, Cluster(8, 8), "full").in_node == 0
    accumulated = replace(config, train=replace(config.train, batches_per_step=192))
    assert plan_step(accumulated, sizes, cluster, "full").gathers == 6
    tight = replace(config, parallel=replace(config.parallel, max_live_parameters=1000))
    assert plan_step(tight, sizes, cluster, "full").gathers == 3
    for backend, gathers in (("deepspeed", 1), ("fsdp2", 2)):
        roomy = replace(config, parallel=replace(config.parallel, backend=backend, max_live_parameters=7_000_000_000))
        assert plan_step(roomy, sizes, cluster, "full").gathers == gathers
    assert full.compute_seconds == node.compute_seconds > 6 * 6.4e9 * 2048 / (cluster.tflops * 1e12)
    assert full.seconds[0] == max(full.compute_seconds, full.traffic_seconds)


def test_changes_make_it_fit(config: Config, sizes: planner.Sizes) -> None:
    greedy = replace(config, model=replace(config.model, checkpointing=False),
                     parallel=replace(config.parallel, max_live_parameters=3_000_000_000))
    for layout, limit in (("replicated", 10 * GIB), ("full", 8 * GIB), ("node", 6 * GIB)):
        assert plan_memory(greedy, sizes, Cluster(64, 8), layout).total > limit
        words, total = cures(greedy, sizes, Cluster(64, 8), layout, limit)
        assert total <= limit
        layouts = [word.split("=")[1] for word in words if word.startswith("parallel.llm=")]
        others = [word for word in words if not word.startswith("parallel.llm=")]
        tried = replace(configuration.load(MULTITASK, others), model=replace(config.model, checkpointing=True))
        assert plan_memory(tried, sizes, Cluster(64, 8), (layouts or [layout])[-1]).total == total
    assert cures(config, sizes, Cluster(1, 1), "replicated", GIB)[1] > GIB
    assert cures(config, sizes, Cluster(64, 8), "full", 80 * GIB)[0] == []


# --- the command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = planner.main(["--config", str(MULTITASK), *words])
    return code, *capsys.readouterr()


def test_the_command_says_what_fits_and_what_to_change(capsys: pytest.CaptureFixture[str], seven: list[str]) -> None:
    code, output, _ = run(capsys, "--gpus", "64", "--gpus-per-node", "8", "--gpu-memory", "24", *seven)
    assert code == 0 and "full: fits" in output and "GB into a node a step" in output
    code, output, _ = run(capsys, "--gpus", "8", "--gpu-memory", "12", *seven)
    assert "replicated: does NOT fit" in output and "parallel.llm=" in output
    code, output, _ = run(capsys, "--gpus", "8,64", "--json", *seven)
    assert json.loads(output)["64"]["full"]["step"]["gathers"] == 2
    code, output, _ = run(capsys, "--gpus", "8,64,1024", *seven)
    assert [line.split("|")[1].strip() for line in output.splitlines() if "| full |" in line] == ["8", "64", "1024"]


@pytest.mark.parametrize("words, message", [
    (["--gpus", "12"], "error: --gpus 12: must be a multiple of --gpus-per-node 8"),
    (["--gpus", "8"], "error: model.llm = 'assets/models/vicuna-7b-v1.5': planning needs its config.json"),
    (["--gpus", "8", "model.llm=nobody/nothing"], "error: model.llm = 'nobody/nothing': planning needs its config"),
    (["--gpus", "8", "pool.prompts=0"], "error: pool.prompts = 0"),
], ids=str)
def test_mistakes_are_one_clear_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, output, errors = run(capsys, *words)
    assert code == 2 and output == "" and errors.startswith(message) and errors.count("\n") == 1
