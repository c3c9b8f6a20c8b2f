"""Bytes that cross between two nodes, counted at the interface.

Two network namespaces with host names of their own are the nodes, a pair of virtual interfaces is the cable,
two ranks run in each. Rings (gloo's, and NCCL's) leave a node on one link, as the planner counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from listen_dist import config as configuration
from listen_dist.model_sizes import sizes_of
from listen_dist.planner import Cluster, plan_step
from listen_dist.schema import Config
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


@dataclass(frozen=True)
class Counted:
    """What the ranks counted in one layout, and what the planner says."""

    ranks: list[dict[str, float]]
    config: Config

    @property
    def planned(self) -> float:
        """Bytes into a node in one step."""
        cluster, layout = Cluster(RANKS, RANKS // 2), self.config.parallel.llm
        return plan_step(self.config, sizes_of(self.config), cluster, layout).in_node

    @property
    def gradients(self) -> float:
        """The trainables' part of it."""
        return 2 * (RANKS - 1) / RANKS * self.ranks[0]["gradients"]


@pytest.fixture(scope="module")
def counted(nodes: dict[str, str], tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory,
            ) -> dict[str, Counted]:
    """All layouts by name."""
    folder = tmp_path_factory.mktemp("nodes")
    tiny.save_wider_llm(folder / "llm")
    words = {name: f"model.llm={folder / 'llm'},model.dtype=bfloat16,train.batches_per_step={RANKS},{layout}"
             for name, layout in LAYOUTS.items()}
    started = []
    for rank in range(RANKS):
        name = list(nodes)[rank * 2 // RANKS]
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(RANKS),
                     "STORE": str(folder / "store"), "GLOO_SOCKET_IFNAME": nodes[name]}
        # A host name of its own shows to the layout where a node ends.
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh",
                   sys.executable, "-m", "tests.distributed.traffic_worker", tiny_world.config_file, folder,
                   nodes[name], *(f"{name}:{keys}" for name, keys in words.items())]
        log = folder / f"rank-{rank}.log"
        started.append((launching.start(command, log, variables), log))
    try:
        for process, log in started:
            launching.wait(process, log, 900).check()
    finally:
        for process, _ in started:
            launching.kill_tree(process)
    found = [json.loads((folder / f"traffic-{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: Counted([one[name] for one in found], configuration.load(tiny_world.config_file, keys.split(",")))
            for name, keys in words.items()}


def test_no_weight_crosses_between_nodes_unless_sharded_over_all(counted: dict[str, Counted]) -> None:
    llm = counted["replicated"].ranks[0]["held"]
    print(f"\nLLM {llm:,} bytes, gradients {counted['full'].ranks[0]['gradients']:,}; two nodes of two ranks")
    for name, one in counted.items():
        assert len({rank["host"] for rank in one.ranks}) == 2
        for rank in (one.ranks[0], one.ranks[-1]):
            print(f"{name:<12} sent by {rank['host']}: {rank['step']:12,.0f} a step (the planner: {one.planned:,.0f}, "
                  f"gradients alone {one.gradients:,.0f}), {rank['loading']:12,.0f} to load")
            if name.endswith("full"):
                assert one.planned > one.gradients + 2 * (RANKS - 1) / RANKS * 0.99 * llm
                assert 0.96 * one.planned <= rank["step"] <= 1.07 * one.planned
            else:
                assert one.planned == pytest.approx(one.gradients)
                assert one.planned <= rank["step"] <= one.planned * 1.05 + OVERHEAD
                assert rank["loading"] < 0.05 * llm
