"""Projectors: token counts, parameter counts of the paper's sizes, and indifference to padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from listen_dist.model_sizes import count
from listen_dist.models.projector import Projector, build_projector
from listen_dist.models.prompt_pool import PromptPool
from listen_dist.schema import PoolConfig, ProjectorConfig

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

WIDTH, LLM_WIDTH, STD = 24, 40, 0.15
KINDS = {"mlp": ProjectorConfig("mlp", window=0.1, hidden=16),
         "qformer": ProjectorConfig("qformer", window=1 / 3, hidden=24, heads=4, layers=2)}


@pytest.fixture(params=sorted(KINDS))
def projector(request: pytest.FixtureRequest) -> Projector:
    torch.manual_seed(0)
    return build_projector(KINDS[request.param], WIDTH, LLM_WIDTH, STD)


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        qformer = build_projector(ProjectorConfig(), 1280 + 768, 4096, 1.0)
        pool = PromptPool(PoolConfig(), torch.empty(4096))
    print(f"\nwindow Q-Former: {count(qformer):,}; pool: {count(pool):,}")
    assert count(pool) == 409_600
    assert 25_500_000 < count(qformer) < 26_500_000
    assert qformer.window_frames == 17


@pytest.mark.parametrize("window, frames", [(1 / 3, 17), (0.333, 17), (0.1, 5), (0.08, 4), (0.02, 1), (0.2, 10)])
def test_window_in_frames(window: float, frames: int) -> None:
    config = dataclasses.replace(KINDS["mlp"], window=window)
    assert build_projector(config, WIDTH, LLM_WIDTH, STD).window_frames == frames


def test_one_token_for_each_window_begun(projector: Projector) -> None:
    window = projector.window_frames
    for frames in (1, window - 1, window, window + 1, 3 * window, 3 * window + 1):
        tokens, lengths = projector(torch.randn(1, frames, WIDTH), torch.tensor([frames]))
        assert tokens.shape == (1, -(-frames // window), LLM_WIDTH) and lengths.tolist() == [tokens.shape[1]]


def test_padding_and_other_rows_do_not_reach_a_clip(projector: Projector) -> None:
    lengths = torch.tensor([1, 40, 17, 23])
    frames = torch.randn(4, 61, WIDTH)
    for row, length in enumerate(lengths.tolist()):
        frames[row, length:] = (torch.nan, torch.inf, 1e6, -3.0)[row]
    tokens, counts = projector(frames, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, (size,) = projector(frames[row : row + 1, :length], lengths[row : row + 1])
        assert counts[row] == size and tokens[row, :size].isfinite().all()
        torch.testing.assert_close(tokens[row, :size], alone[0], rtol=1e-5, atol=1e-6)


def test_a_short_last_window_attends_to_its_frames_alone() -> None:
    torch.manual_seed(0)
    projector = build_projector(KINDS["qformer"], WIDTH, LLM_WIDTH, STD)
    frames = torch.randn(1, 3, WIDTH)
    in_a_long_window, _ = projector(frames, torch.tensor([3]))
    projector.window_frames = 3
    torch.testing.assert_close(in_a_long_window, projector(frames, torch.tensor([3]))[0])


def test_padding_gives_no_gradient(projector: Projector) -> None:
    lengths = torch.tensor([9, 30])
    frames = torch.randn(2, 44, WIDTH)
    frames[0, 9:], frames[1, 30:] = torch.nan, torch.inf
    tokens, counts = projector(frames, lengths)
    sum(tokens[row, :size].square().sum() for row, size in enumerate(counts)).backward()
    together = {name: p.grad.clone() for name, p in projector.named_parameters() if p.grad is not None}
    assert set(together) == {name for name, _ in projector.named_parameters()}
    projector.zero_grad()
    for row, length in enumerate(lengths.tolist()):
        projector(frames[row : row + 1, :length], lengths[row : row + 1])[0].square().sum().backward()
    for name, p in projector.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(together[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_tokens_begin_at_the_scale_of_text(projector: Projector) -> None:
    tokens, _ = projector(torch.randn(3, 50, WIDTH), torch.tensor([50, 50, 50]))
    assert float(tokens.detach().square().mean().sqrt()) == pytest.approx(STD, rel=0.05)


def test_the_seed_fixes_the_weights(projector: Projector) -> None:
    kind = "mlp" if "MLP" in type(projector).__name__ else "qformer"
    torch.manual_seed(0)
    again = build_projector(KINDS[kind], WIDTH, LLM_WIDTH, STD)
    assert all(torch.equal(a, b) for a, b in zip(projector.parameters(), again.parameters(), strict=True))
