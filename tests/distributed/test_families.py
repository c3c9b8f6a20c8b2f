"""LLMs that went wrong once: one process equals plain PyTorch, and two ranks equal it under ZeRO-3 and FSDP2.

`make families` tries all families of transformers so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families, tiny

pytestmark = [pytest.mark.timeout(1500), pytest.mark.usefixtures("one_thread")]

BEAMLESS = ("falcon_h1", "jamba", "lfm2", "mamba")
"""They keep a state, which transformers doesn't sort by beams."""


@pytest.fixture(scope="module")
def folder(tiny_world: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for each way of laying an LLM out."""
    folder = tmp_path_factory.mktemp("families")
    for name in families.BROKEN:
        families.build(folder / name, name)
    for world, backend in ((1, "alone"), (2, "deepspeed"), (2, "fsdp2")):
        families.run(world, backend, folder, tiny_world.config_file, families.BROKEN, 450)
    return folder


@pytest.mark.parametrize("name", families.BROKEN)
def test_a_family_is_right_in_every_layout(folder: Path, name: str) -> None:
    right = "right; beams are refused" if name in BEAMLESS else "right"
    found = {backend: families.verdict(folder, name, backend, against)
             for backend, against in (("alone", "plain"), ("deepspeed", "alone"), ("fsdp2", "alone"))}
    assert found == dict.fromkeys(found, right)
