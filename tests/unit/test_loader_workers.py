"""Loader processes: a dead or raising one is an error at once, an ended iterator leaves none, memory stays bounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psutil
import pytest
from torch.utils.data import Dataset

from listen_dist.data.collate import collate
from listen_dist.data.features import LogMel
from listen_dist.data.loader import BatchReader, _batches, training_steps
from listen_dist.data.mixture import Mixture
from listen_dist.data.remote import SourceError
from listen_dist.data.schedule import TokenCost
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder
from listen_dist.models.llm import load_tokenizer
from listen_dist.schema import SetConfig
from listen_dist.structures import Batch, LoaderState
from tests import tiny

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]

BAD = 10


class Empty(Dataset[Batch]):
    """Empty batches; item BAD can't be read."""

    def __getitem__(self, place: int) -> Batch:
        if place == BAD:
            raise SourceError("https://host/shard-000003.tar: no answer; try again")
        return collate([], False, [])


def children() -> list[psutil.Process]:
    """The running loader processes (not Python's own tracker of shared resources)."""
    running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in running if "spawn_main" in " ".join(child.cmdline())]


def endless(start: int) -> Iterator[Batch]:
    return _batches(Empty(), itertools.count(start), workers=2)  # type: ignore[arg-type]


def test_a_raising_worker_is_an_error_with_its_message_first_then_its_traceback_and_leaves_none() -> None:
    # Keeps no traceback: that would keep the worker processes alive.
    with pytest.raises(SourceError, match=r"(?s)\Ahttps://host/shard-000003.tar: no answer; try again\n.*worker process"
                                          r".*Traceback.*__getitem__"):
        for place, _ in enumerate(endless(0)):
            assert place < BAD
    assert not psutil.wait_procs(children(), timeout=30)[1]


def test_memory_does_not_grow_with_the_number_of_batches(tiny_world: tiny.Tiny) -> None:
    config = tiny_world.config("data.batch_tokens=40")
    reader = BatchReader([ShardIndex.load(tiny_world.speech)], LogMel.from_pretrained(config.model.speech_encoder),
                         TextEncoder(load_tokenizer(config.model.llm), config.model), config.data, True)
    mixture = Mixture(reader.indexes, [SetConfig("set")], 0)
    steps = training_steps(reader, mixture, TokenCost(5, 10.0), config.data, 0, 1, 0, 1, LoaderState())
    process, sizes, read = psutil.Process(), [], 0
    for _ in range(3):
        for batches, _ in itertools.islice(steps, 300):
            read += sum(batch.audio.numel() * 4 for batch in batches)
        sizes.append(process.memory_info().rss)
    assert read > 50e6
    assert sizes[-1] - sizes[0] < 8e6
