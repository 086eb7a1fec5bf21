"""Transformers that nobody here planned for: a user's own class, followed through its own code."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from omni_sp import ShardingError, parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import Plan, Split
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
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


def followed(mesh: ParallelMesh, window: int | None, plan: Plan | None) -> tuple[float, bool, dict[str, int]]:
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


def wrapped(mesh: ParallelMesh, by_name: bool) -> tuple[float, dict[str, int]]:
    """Blocks whose class's forward stands behind one that says nothing of its parameters."""
    model, picture = randomise(Own()), torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    forward = Block.forward

    def passing_on(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def call_by_name(self: Any, picture: torch.Tensor) -> torch.Tensor:
        x = self.embed(picture.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x=x, size=picture.shape[2:], window=None)
        pixels: torch.Tensor = self.out(x)
        return pixels.transpose(1, 2).reshape(picture.shape)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.object(Block, "forward", passing_on))
        if by_name:
            stack.enter_context(mock.patch.object(Own, "forward", call_by_name))
        wanted = model(picture)
        handle = parallelize(model, mesh)
        return relative_error(model(picture), wanted), handle.tokens


@pytest.mark.parametrize("by_name", [False, True])
def test_a_wrapper_without_named_parameters_is_followed(ranks: RankPool, by_name: bool) -> None:
    for error, tokens in ranks.run(wrapped, by_name, ulysses=2):
        assert error <= 1e-5
        assert list(tokens.values()) == [35]


def counted(mesh: ParallelMesh) -> list[dict[str, int]]:
    """What two forwards gathered, in the way of each operation, and what is counted after a reset."""
    model, picture = randomise(Own()), torch.ones(1, 4, 5, 7)
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
            plan = Plan({"blocks.0": {"x": Split(dim=dim)}})
            for error, *_ in ranks.run(followed, 4, plan, ulysses=ulysses, ring=ring):
                assert error <= 1e-5


def refused(mesh: ParallelMesh) -> list[str]:
    model: Any = randomise(Own())
    picture = torch.zeros(1, 4, 3, 3)
    messages = [error_of(lambda: parallelize(NoBlocks(), mesh))]
    handle = parallelize(model, mesh, plan=Plan({"blocks.0": {"x": Split(dim=1, ndim=5)}}))
    messages.append(error_of(lambda: model(picture)))
    handle.remove()
    messages.append(error_of(lambda: parallelize(model, mesh, plan=Plan({"layers.0": {"x": Split(dim=1)}}))))
    messages.append(error_of(lambda: parallelize(model, mesh, plan=Plan({"blocks.0": {"y": Split(dim=1)}}))))
    return messages


def test_refusals_say_what_to_do(ranks: RankPool) -> None:
    for no_blocks, nothing_cut, no_module, no_parameter in ranks.run(refused, ulysses=2):
        assert no_blocks.startswith("UnsupportedModelError: NoBlocks has no list of blocks")
        assert "plan=Plan(...)" in no_blocks
        assert nothing_cut.startswith(f"{ShardingError.__name__}: no tensor of Own was cut")
        assert "speaks of 'layers.0', which it has not" in no_module
        assert "cuts ['y'] of 'blocks.0', whose forward takes ['x', 'size', 'window']" in no_parameter
