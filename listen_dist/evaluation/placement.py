"""Whether the LLM is gathered whole on every rank for decoding."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from listen_dist import dist
from listen_dist.engine.assembly import Parts
from listen_dist.model_sizes import llm_size
from listen_dist.planner import room_for_whole
from listen_dist.schema import Config

logger = logging.getLogger(__name__)


@contextmanager
def placed(parts: Parts) -> Iterator[bool]:
    """Gather the LLM or leave it sharded, as `eval.llm` says; yields whether it is whole. Every rank alike."""
    if gather(parts.config, parts.model.device):
        with parts.sharding.whole():
            yield True
    else:
        yield False


def gather(config: Config, device: torch.device) -> bool:
    """Decide, the same on every rank."""
    if config.parallel.llm == "replicated" or dist.world_size() == 1:
        return True
    if config.eval.llm != "auto":
        return config.eval.llm == "whole"
    needed, free = room_for_whole(config, llm_size(config.model.llm)), free_bytes(device)
    logger.info("decoding with the whole LLM on every rank takes %.0f MiB more, %.0f MiB are free: it %s (eval.llm = "
                "auto)", needed / 2**20, free / 2**20, "is gathered" if needed <= free else "stays sharded")
    return needed <= free


def free_bytes(device: torch.device) -> int:
    """The least that any rank may still take, ranks of one machine sharing its memory; the same on every rank."""
    here = socket.gethostname()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps for later counts as taken
        return int(min(dist.gather_objects(torch.cuda.mem_get_info(device)[0])))
    everywhere = dist.gather_objects((here, psutil.virtual_memory().available))
    hosts = [host for host, _ in everywhere]
    return int(min(free // hosts.count(host) for host, free in everywhere))
