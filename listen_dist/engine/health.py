"""A look at the network before a run: how fast every two nodes exchange."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed

from listen_dist import dist

logger = logging.getLogger(__name__)

MEGABYTES = 32


def rounds_of_pairs(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of 0 … count − 1 once, in rounds in which nobody occurs twice (a round-robin tournament)."""
    seats = list(range(count + count % 2))
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        yield [(a, b) for a, b in zip(seats[:half], reversed(seats[half:]), strict=True) if max(a, b) < count]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def report_links(device: torch.device) -> None:
    """Log the bandwidth between every two nodes, the slowest named; every rank must call it."""
    node = f"{socket.gethostname()}{os.environ.get('SLURM_NODEID', '')}"
    nodes = dist.gather_objects(node)
    leaders = [nodes.index(name) for name in dict.fromkeys(nodes)]  # the first rank of each node
    payload = torch.ones(MEGABYTES * 2**18, device=device)
    measured: dict[tuple[int, int], float] = {}
    for pairs in rounds_of_pairs(len(leaders)):
        dist.barrier()
        for pair in ((leaders[a], leaders[b]) for a, b in pairs):
            if dist.rank() in pair:
                _exchange(payload[:1], pair)  # connections are made at the first use
                measured[pair] = payload.nbytes / _exchange(payload, pair) / 1e9
    found = {pair: speed for part in dist.gather_objects(measured) for pair, speed in part.items()}
    if not found:
        logger.info("health: all ranks are on one node, no link between nodes to measure")
        return
    slowest = sorted(found, key=found.__getitem__)[:3]
    logger.info("health: %d pairs of nodes exchange at a median of %.2f GB/s each way; slowest: %s", len(found),
                statistics.median(found.values()),
                ", ".join(f"{nodes[a]} and {nodes[b]} {found[a, b]:.2f} GB/s" for a, b in slowest))


def _exchange(payload: torch.Tensor, pair: tuple[int, int]) -> float:
    """Send to the other rank of the pair and receive as much; the seconds it took."""
    other = pair[1] if dist.rank() == pair[0] else pair[0]
    received = torch.empty_like(payload)
    start = time.perf_counter()
    for work in torch.distributed.batch_isend_irecv([
            torch.distributed.P2POp(torch.distributed.isend, payload, other),
            torch.distributed.P2POp(torch.distributed.irecv, received, other)]):
        work.wait()
    float(received[-1])  # on a GPU the work is only queued
    return time.perf_counter() - start
