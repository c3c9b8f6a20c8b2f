"""The folder of what browsers sent: bounded, and without a trace afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from listen_dist.inference.uploads import MOST_CLIPS, TooLarge, Uploads


async def blocks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"10 bytes.."


def test_the_oldest_goes() -> None:
    uploads = Uploads(100)
    keys = [asyncio.run(uploads.receive(f"../{i}.wav", blocks(1))) for i in range(MOST_CLIPS + 1)]
    assert len(set(keys)) == MOST_CLIPS + 1 and uploads.get(keys[0]) is None
    newest = uploads.get(keys[-1])
    assert newest is not None and newest.name == f"../{MOST_CLIPS}.wav" and newest.path.parent == uploads.folder
    assert newest.path.suffix == ".wav", "of formats without a header the name tells which"
    assert len(list(uploads.folder.iterdir())) == MOST_CLIPS
    uploads.close()
    assert not uploads.folder.exists()


def test_too_much_is_not_kept() -> None:
    uploads = Uploads(100)
    asyncio.run(uploads.receive("fits.wav", blocks(10)))
    with pytest.raises(TooLarge, match="limit"):
        asyncio.run(uploads.receive("large.wav", blocks(11)))
    assert len(list(uploads.folder.iterdir())) == 1
    uploads.close()
