"""Transformers that nobody here planned for: a user's own class, followed through its own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from omni_sp import ShardingError, parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import Split, TrackedPlan
from testing.ranks import RankPool
from testing.reference import randomise, relative_error
from tests.sharding.test_refusals import error_of


class Block(nn.Module):
    """Attention with a window for each query, a convolution over positions, and a mean over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, size: tuple[int, int], window: int | None) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if window is not None:
            positions = torch.arange(tokens)
            mask = (positions[:, None] - positions[None]).abs() <= window
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attended.transpose(1, 2).reshape(batch, tokens, width)
        picture = self.conv(x.transpose(1, 2).unflatten(2, size))
        x = x + picture.flatten(2).transpose(1, 2)
        return x * torch.sigmoid(self.gate(x.mean(dim=1, keepdim=True)))


class Own(nn.Module):
    """A user's transformer: pixels to tokens and back, some tokens of its own in front."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.out = nn.Linear(width, 4)

    def forward(self, picture: torch.Tensor, window: int | None = None) -> torch.Tensor:
        batch, channels, height, width = picture.shape
        x = self.embed(picture.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, (height, width), window)
        pixels: torch.Tensor = self.out(x)
        return pixels.transpose(1, 2).reshape(batch, channels, height, width)


class NoBlocks(nn.Module):
    """Nothing that could be found."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def followed(mesh: ParallelMesh, window: int | None, plan: TrackedPlan | None) -> tuple[float, bool, dict[str, int]]:
    model = randomise(Own())
    picture = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(picture, window)
        handle = parallelize(model, mesh, plan=plan)
        found, tokens = model(picture, window), handle.tokens
        handle.remove()
        return relative_error(found, wanted), torch.equal(model(picture, window), wanted), tokens


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_a_users_own_class_is_exact(ranks: RankPool, window: int | None, ulysses: int, ring: int) -> None:
    for error, restored, tokens in ranks.run(followed, window, None, ulysses=ulysses, ring=ring):
        assert error <= 1e-5
        assert restored
        assert tokens == {"x": 35}


def counted(mesh: ParallelMesh) -> list[dict[str, int]]:
    """What two forwards gathered, in the way of each operation, and what is counted after a reset."""
    model, picture = randomise(Own()), torch.randn(1, 4, 5, 7)
    handle = parallelize(model, mesh)
    found = []
    with torch.no_grad():
        for window in (None, 4):
            model(picture, window)
            found.append(handle.gathers)
    handle.reset_counts()
    return [*found, handle.gathers]


def test_operations_that_need_a_full_tensor_are_counted(ranks: RankPool) -> None:
    for first, both, after_reset in ranks.run(counted, ulysses=2):
        assert first == {"aten.mean.dim": 2}
        assert both == {"aten.mean.dim": 4, "attention": 4}  # keys and values of two blocks
        assert after_reset == {}


def test_what_is_cut_does_not_decide_what_is_exact(ranks: RankPool) -> None:
    for dim in (0, -1):  # the batch; the channels, which every linear layer needs in full
        for ulysses, ring in ((2, 1), (3, 1), (2, 2)):  # a batch of two leaves a third and a fourth rank without any
            plan = TrackedPlan({"blocks.0": {"x": Split(dim=dim)}})
            for error, *_ in ranks.run(followed, 4, plan, ulysses=ulysses, ring=ring):
                assert error <= 1e-5


def refused(mesh: ParallelMesh) -> list[str]:
    model: Any = randomise(Own())
    picture = torch.zeros(1, 4, 3, 3)
    messages = [error_of(lambda: parallelize(NoBlocks(), mesh))]
    handle = parallelize(
        model, mesh, plan=TrackedPlan({"blocks.0": {"x": Split(dim=1, ndim=5, replicate_if_ndim_differs=True)}})
    )
    messages.append(error_of(lambda: model(picture)))
    handle.remove()
    messages.append(error_of(lambda: parallelize(model, mesh, plan=TrackedPlan({"layers.0": {"x": Split(dim=1)}}))))
    messages.append(error_of(lambda: parallelize(model, mesh, plan=TrackedPlan({"blocks.0": {"y": Split(dim=1)}}))))
    return messages


def test_refusals_say_what_to_do(ranks: RankPool) -> None:
    for no_blocks, nothing_cut, no_module, no_parameter in ranks.run(refused, ulysses=2):
        assert no_blocks.startswith("UnsupportedModelError: NoBlocks has no sharding plan and no list of blocks")
        assert "plan=TrackedPlan(...)" in no_blocks
        assert nothing_cut.startswith(f"{ShardingError.__name__}: no tensor of Own was cut")
        assert "speaks of 'layers.0', which it has not" in no_module
        assert "cuts ['y'] of 'blocks.0', whose forward takes ['x', 'size', 'window']" in no_parameter
