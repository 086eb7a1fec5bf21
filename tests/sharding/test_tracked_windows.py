"""What networks of pictures do to rows that lie on several ranks, as on full tensors, and without a gather."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.forward_context import ShardedForward, activate
from omni_sp.sharding.tracked import TokenTensor, local_shard, to_full_tensors
from omni_sp.sharding.tracked.placement import concatenated, contiguous_placement
from omni_sp.testing.ranks import RankPool

Operation = Callable[[Tensor], Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def conv(kernel: int, cross: int = 3, **options: int) -> Operation:
    """Over pictures of four channels: a kernel of so many rows, and of so many columns."""
    groups = options.get("groups", 1)
    weight = numbers(6, 4 // groups, kernel, cross)
    along = {name: (value, 1) for name, value in options.items() if name in ("stride", "dilation")}
    padding = (options.get("padding", 0), 1)
    return lambda x: F.conv2d(x, weight, numbers(6), padding=padding, groups=groups, **along)


def transposed(kernel: int, stride: int, padding: int = 0, output_padding: int = 0, dilation: int = 1) -> Operation:
    def run(x: Tensor) -> Tensor:
        weight = numbers(4, 5, kernel, 3)
        return F.conv_transpose2d(
            x, weight, numbers(5), (stride, 1), (padding, 1), (output_padding, 0), dilation=(dilation, 1)
        )

    return run


OPERATIONS: dict[str, Operation] = {
    "same": conv(3, padding=1),
    "reach two": conv(5, padding=2),
    "reach far": conv(7, padding=3, dilation=2),
    "no padding": conv(3),
    "more padding": conv(3, padding=2),
    "even kernel": conv(4, padding=1),
    "even kernel, padding one side": lambda x: conv(4)(F.pad(x, (0, 0, 1, 2))),
    "points": conv(1),
    "grouped": conv(3, padding=1, groups=2),
    "half": conv(3, padding=1, stride=2),
    "half, even": conv(2, stride=2),
    "half, padded behind": lambda x: conv(3, stride=2)(F.pad(x, (0, 1, 0, 1))),
    "a third": conv(5, padding=2, stride=3),
    "gaps": conv(1, stride=3),
    "conv1d": lambda x: F.conv1d(x.movedim(3, 1).flatten(1, 2), numbers(3, 24, 3), stride=2, padding=1),
    "conv3d": lambda x: F.conv3d(x[:, :, None], numbers(2, 4, 1, 3, 3), padding=(0, 1, 1)),
    "twice": transposed(2, 2),
    "twice, smooth": transposed(4, 2, 1),
    "twice, odd": transposed(3, 2, 1, 1),
    "three times": transposed(5, 3, 1, 2),
    "transposed, dilated": transposed(3, 2, 1, 0, 2),
    "transposed, same": transposed(3, 1, 1),
    "group norm": lambda x: F.group_norm(x, 2, numbers(4), numbers(4), 1e-3),
    "group norm without weights": lambda x: F.group_norm(x + 100, 4),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "nearest, three times": lambda x: F.interpolate(x, scale_factor=(3.0, 1.5)),
    "nearest by size": lambda x: F.interpolate(x, (x.shape[2] * 2, 7), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear, three times": lambda x: F.interpolate(x, (x.shape[2] * 3, 9), mode="bilinear", align_corners=False),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "trilinear": lambda x: F.interpolate(x[:, :, None], scale_factor=(1, 2, 2), mode="trilinear"),
    "nearest, half": lambda x: F.interpolate(x[:, :, : x.shape[2] // 2 * 2], scale_factor=0.5),
    "nearest-exact, half": lambda x: F.interpolate(
        x[:, :, : x.shape[2] // 2 * 2], scale_factor=0.5, mode="nearest-exact"
    ),
    "bilinear, half": lambda x: F.interpolate(x[:, :, : x.shape[2] // 2 * 2], scale_factor=0.5, mode="bilinear"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[:, :, : x.shape[2] // 2 * 2], 2),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, overlapping": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average of three dims": lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2), (1, 2, 1)),
    "average of batch": lambda x: F.avg_pool1d(x.transpose(2, 3).flatten(1, 2), 3, 1, 1),
    "pad": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1), value=2.0)),
    "pad more": lambda x: F.pad(x, (0, 0, 5, 9)),
    "replicate": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1), mode="replicate")),
    "replicate of three dims": lambda x: F.pad(x[:, :, None], (1, 1, 2, 1, 2, 0), mode="replicate"),
    "reflect far": lambda x: F.pad(x, (2, 3, 4, 6), mode="reflect"),
    "reflect": lambda x: conv(3)(F.pad(x, (1, 1, 1, 1), mode="reflect")),
}


def followed(mesh: ParallelMesh, operation: Operation, x: TokenTensor) -> tuple[Tensor, dict[str, int]]:
    """The result, and what was gathered for it."""
    gathers: dict[str, int] = {}
    with torch.no_grad(), activate(ShardedForward(mesh, None, {}, gathers)):
        return operation(x), gathers


def compare(mesh: ParallelMesh, lengths: tuple[int, ...], dim: int) -> dict[str, str]:
    """What is wrong with the operations along one dim; ``lengths`` of several times as many ranks are not in order."""
    size, axis = sum(lengths), mesh.world
    placement = contiguous_placement(lengths[: axis.size])
    if len(lengths) > axis.size:
        placement = concatenated((placement, contiguous_placement(lengths[axis.size :])))
    wrong: dict[str, str] = {}
    for name, operation in OPERATIONS.items():
        x = numbers(2, 4, size, 6)
        full = x if dim == 2 else numbers(size, 4, 8, 6)
        sharded = TokenTensor(local_shard(full, dim, placement, axis).clone(), dim, placement, axis)
        wanted = operation(full)
        found, gathers = followed(mesh, operation, sharded)
        if gathers:
            wrong[name] = f"gathered {gathers}"
        got = to_full_tensors(found)
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-11, atol=1e-11):
            wrong[name] = f"{tuple(got.shape)} for {tuple(wanted.shape)}" if got.shape != wanted.shape else "numbers"
    return wrong


LENGTHS = [
    (8, 8),
    (9, 4),
    (1, 12),
    (13, 0),
    (0, 13),
    (5, 4, 4),
    (6, 0, 7),
    (1, 1, 8),
    (9, 1, 0),
    (3, 3, 3, 3),
    (3, 0, 0, 4),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows_of_any_lengths(ranks: RankPool, lengths: tuple[int, ...]) -> None:
    for wrong in ranks.run(compare, lengths, 2, ulysses=len(lengths)):
        assert not wrong


def test_rows_that_lie_in_two_pieces(ranks: RankPool) -> None:
    for wrong in ranks.run(compare, (3, 4, 4, 3), 2, ulysses=2):
        assert not wrong


def test_a_batch_may_be_sharded(ranks: RankPool) -> None:
    for lengths in ((2, 1), (0, 3)):
        for wrong in ranks.run(compare, lengths, 0, ulysses=2):
            assert not wrong
