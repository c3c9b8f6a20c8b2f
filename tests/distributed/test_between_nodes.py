"""Bytes that cross between two nodes, counted at the interface.

Two network namespaces with host names of their own are the nodes, a pair of virtual interfaces is the cable,
two ranks run in each. Rings (gloo's, and NCCL's) leave a node on one link, so that per step and direction

    full   (R − 1) / R · (2 · gradients + gathers · LLM)
    node   (R − 1) / R ·  2 · gradients
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import launching, tiny
from tests.distributed.scenarios import LAYOUTS

RANKS, NODES = 4, ("listen-a", "listen-b")
OVERHEAD = 20_000
"""Bytes a step for packet headers, barriers and counts."""
pytestmark = pytest.mark.timeout(1800)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Two joined network namespaces: name to interface."""
    names = [f"{node}-{os.getpid()}" for node in NODES]
    cables = [f"ls{os.getpid() % 10**6}{end}" for end in "ab"]
    made: list[str] = []
    try:
        for name in names:
            ip(f"netns add {name}")
            made.append(name)
        ip(f"link add {cables[0]} netns {names[0]} type veth peer name {cables[1]} netns {names[1]}")
        for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip(f"-n {name} addr add 10.213.77.{i + 1}/24 dev {cable}")
            ip(f"-n {name} link set {cable} up")
            ip(f"-n {name} link set lo up")
        yield dict(zip(names, cables, strict=True))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
    finally:
        for name in made:
            ip(f"netns del {name}")


@pytest.fixture(scope="module")
def counted(nodes: dict[str, str], tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory,
            ) -> dict[str, list[dict[str, float]]]:
    """What each rank counted, by layout."""
    folder = tmp_path_factory.mktemp("nodes")
    tokenizer = tiny.build_tokenizer()
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)).bfloat16().save_pretrained(folder / "llm")
    words = [f"{name}:model.llm={folder / 'llm'},model.dtype=bfloat16,{layout}" for name, layout in LAYOUTS.items()]
    started = []
    for rank in range(RANKS):
        name = list(nodes)[rank * 2 // RANKS]
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(RANKS),
                     "STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": nodes[name]}
        # A host name of its own shows to the layout where a node ends.
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh",
                   sys.executable, "-m", "tests.distributed.traffic_worker", tiny_world.config_file, folder,
                   nodes[name], *words]
        log = folder / f"rank-{rank}.log"
        started.append((launching.start(command, log, variables), log))
    try:
        for process, log in started:
            launching.wait(process, log, 900).check()
    finally:
        for process, _ in started:
            launching.kill_tree(process)
    found = [json.loads((folder / f"traffic-{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: [one[name] for one in found] for name in LAYOUTS}


def test_no_weight_crosses_between_nodes_unless_sharded_over_all(counted: dict[str, list[dict[str, float]]]) -> None:
    llm = counted["replicated"][0]["held"]
    share = (RANKS - 1) / RANKS
    print(f"\nLLM {llm:,} bytes, gradients {counted['full'][0]['gradients']:,}; bytes between two nodes of two ranks")
    for name, ranks in counted.items():
        assert len({one["host"] for one in ranks}) == 2
        gradients = share * 2 * ranks[0]["gradients"]
        for one in (ranks[0], ranks[-1]):
            gathers = (one["step"] - gradients) / (share * llm)
            print(f"{name:<12} sent by {one['host']}: {one['step']:12,.0f} a step (gradients {gradients:,.0f}, "
                  f"LLM gathered {gathers:.2f} times), {one['loading']:12,.0f} to load")
            if name.endswith("full"):
                assert 1.9 <= gathers <= 2.2
            else:
                assert gradients <= one["step"] <= gradients * 1.05 + OVERHEAD
                assert one["loading"] < 0.05 * llm
