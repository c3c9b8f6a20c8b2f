"""Ranks, reductions and seeds. Knows no model and works the same on one process."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from listen_dist.errors import ListenError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SAY_MISSING = 20.0
"""Seconds between two lines about ranks that have not come yet."""
_OUR_FAULT = ("op.preamble.length", "ncclInvalidUsage", "ncclInvalidArgument", "invalid usage", "invalid argument")
"""What collectives say where the ranks called them with different things; nobody is gone then."""


def setup(device: str, timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher describes; alone without a launcher.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is a GPU).
        timeout_minutes: a collective that takes longer ends the run.

    Returns:
        The device of this rank.

    Raises:
        ListenError: "cuda" on a machine without a usable GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ListenError("device = 'cuda': no usable NVIDIA GPU here; set device=cpu or run where there is one")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    target = torch.device("cpu")
    if use_cuda:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        backend, limit = "nccl" if use_cuda else "gloo", timedelta(minutes=timeout_minutes)
        if os.environ["WORLD_SIZE"] == "1" or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun names who is missing
            dist.init_process_group(backend, timeout=limit)
        else:
            store = _meet(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), limit)
            dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]),
                                    world_size=int(os.environ["WORLD_SIZE"]), timeout=limit)
    return target


def _meet(own: int, world: int, limit: timedelta) -> dist.TCPStore:
    """The store that the ranks meet over, once all have come; rank 0 says meanwhile who is missing.

    Raises:
        ListenError: the port is taken.
        DistNetworkError: not all came in time.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        try:
            store = dist.TCPStore(host, port, world, own == 0, timedelta(seconds=SAY_MISSING), wait_for_workers=False)
            break
        except dist.DistError as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise ListenError(f"MASTER_PORT = {port}: taken on {host}, by another run perhaps; give another one: "
                                  "deepspeed --master_port N, or MASTER_PORT=N") from None
            if time.monotonic() > deadline:
                raise
            logger.warning("rank 0 doesn't answer yet at %s:%d", host, port)
    store.set_timeout(limit)
    store.set(f"here/{own}", socket.gethostname())
    if own:
        store.wait(["all here"])
        return store
    missing, said = list(range(1, world)), time.monotonic()
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        if now > deadline:
            raise dist.DistNetworkError(f"of {world} ranks {missing[:8]} didn't come within {limit}")
        if now - said > SAY_MISSING:
            said = now
            logger.warning("waiting for %d of %d ranks, which have not come yet: %s%s", len(missing), world,
                           ", ".join(map(str, missing[:8])), " …" if len(missing) > 8 else "")
        time.sleep(0.05)
    store.set("all here", "1")
    return store


def shutdown(failed: bool = False) -> None:
    """Leave the process group.

    Args:
        failed: this rank ends by an error of its own. Then NCCL is left to end with the process: it would wait here
            for ranks that wait for this one, before any traceback is printed.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 … world_size() − 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one rank that writes files and prints. Never put a collective under it."""
    return rank() == 0


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def node_ranks(node_size: int) -> list[list[int]]:
    """The ranks of each node, in order; every rank must call it.

    Args:
        node_size: ranks of one node, in order; 0: ranks with the same host name share a node.

    Raises:
        ListenError: the ranks cannot be cut into nodes of `node_size`.
    """
    world = world_size()
    if node_size:
        if world % node_size:
            raise ListenError(f"parallel.node_size = {node_size}: does not divide the {world} ranks; "
                             "set it to the ranks on one node, or to 0 to go by host names")
        return [list(range(first, first + node_size)) for first in range(0, world, node_size)]
    hosts = gather_objects(socket.gethostname())
    return [[rank for rank in range(world) if hosts[rank] == host] for host in dict.fromkeys(hosts)]


def node_group(node_size: int, timeout_minutes: float) -> dist.ProcessGroup:
    """A process group of the ranks on this rank's node (see `node_ranks`); every rank must call it."""
    # Not inherited from the default group: NCCL's would be 10 minutes.
    own, _ = dist.new_subgroups_by_enumeration(node_ranks(node_size), timeout=timedelta(minutes=timeout_minutes))
    return own


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. Only between the ranks of one run: it pickles."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[..., T], *words: Any) -> T:
    """Rank 0 alone does `action(*words)`; its result, or the exception it raised, comes out on every rank."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = (action(*words), None)
        except Exception as error:  # raised again below, on all ranks
            outcome = (None, error)
    value, raised = broadcast_object(outcome)
    if raised is not None:
        raise raised
    return value


def lost_contact(error: Exception) -> bool:
    """Whether an exception is a collective's: it timed out, or another rank is gone."""
    if any(word in str(error) for word in _OUR_FAULT):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank. Only between the ranks of one run: it pickles."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts and on nothing else (unlike Python's `hash`)."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw_k(seed: int, step: int, k_max: int) -> int:
    """The number of prompts for one training step, uniform on 1 … k_max (LiSTEN's stochastic k).

    A pure function of (seed, step), so every rank draws the same k without a message,
    and a resumed run draws what the unbroken one would have drawn.
    """
    return random.Random(derived_seed("k", seed, step)).randint(1, k_max)


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step on this rank, so that dropout needs no saved generator state."""
    torch.manual_seed(derived_seed("dropout", seed, step, rank()))
