"""Lazy tensors: what is recorded, what asks for the numbers, and that the numbers are those of plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni_sp.errors import ShardingError
from omni_sp.sharding.lazy import LazyRound, LazyTensor, full_tensors

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
RECORDED: dict[str, Callable[[Any, Any], Any]] = {
    "slice": lambda x, y: x[:, 1:4],
    "chunk": lambda x, y: x.float().chunk(2, 1)[1],
    "guidance": lambda x, y: y + 2.5 * (x - y),
    "rescale": lambda x, y: x * (y.std(dim=[1, 2], keepdim=True) / x.std(dim=[1, 2], keepdim=True)),
    "norm": lambda x, y: x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "stack": lambda x, y: torch.stack([y, x]).mean(0),
    "pad": lambda x, y: F.pad(x, (0, 1)),
    "cast": lambda x, y: x.to(torch.bfloat16).to(y.dtype),
    "reshape": lambda x, y: x.permute(2, 0, 1).reshape(4, -1),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}
READ: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda x: x @ x.transpose(1, 2),
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "format": lambda x: f"{x[0, 0, 0]:.3f}",
    "tolist": lambda x: x[0, 0].tolist(),
    "numpy": lambda x: x.numpy().sum(),
    "copy": lambda x: torch.empty(2, 8, 4).copy_(x),
    "deepcopy": copy.deepcopy,
}


def lazy_of(numbers: torch.Tensor) -> tuple[LazyTensor, list[str]]:
    """A lazy tensor that gets these numbers, and the reasons of the exchanges so far."""
    reasons: list[str] = []

    def exchange(reason: str) -> None:
        reasons.append(reason)
        lazy.receive(numbers)

    round_ = LazyRound(exchange)
    lazy = round_.tensor(numbers.shape, numbers.stride(), numbers.dtype, numbers.device)
    return lazy, reasons


@MODES
@pytest.mark.parametrize("name", RECORDED)
def test_what_needs_no_numbers_waits_for_them(name: str, mode: Callable[[], Any]) -> None:
    with mode():
        numbers, other = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
        expected = RECORDED[name](numbers, other)
        lazy, reasons = lazy_of(numbers)
        result = RECORDED[name](lazy, other)
        assert not reasons
        assert (result.shape, result.stride(), result.dtype) == (expected.shape, expected.stride(), expected.dtype)
        other.zero_()  # in one process the operation has read it by now
        assert torch.equal(full_tensors(result, "the test"), expected)
        assert reasons == ["the test"]


@MODES
@pytest.mark.parametrize("name", READ)
def test_what_needs_numbers_asks_for_them_once(name: str, mode: Callable[[], Any]) -> None:
    with mode():
        numbers = torch.randn(2, 8, 4)
        lazy, reasons = lazy_of(numbers)
        result, expected = READ[name](lazy), READ[name](numbers)
        assert len(reasons) == 1
        assert torch.equal(result, expected) if isinstance(expected, torch.Tensor) else result == expected
        assert READ[name](lazy) is not None
        assert len(reasons) == 1


@torch.no_grad()
def test_a_write_comes_after_what_was_recorded_before_it() -> None:
    numbers = torch.randn(2, 8, 4)
    before = numbers.clone()
    lazy, reasons = lazy_of(numbers)
    doubled, row = lazy * 2, lazy[:, 0]
    lazy.mul_(10)
    assert len(reasons) == 1
    assert torch.equal(full_tensors(doubled, ""), before * 2)
    assert torch.equal(full_tensors(row, ""), before[:, 0] * 10)  # a view
    assert torch.equal(full_tensors(lazy, ""), before * 10)


@torch.no_grad()
def test_random_numbers_are_drawn_at_once() -> None:
    lazy, reasons = lazy_of(torch.zeros(2, 3))
    torch.manual_seed(3)
    drawn = torch.randn_like(lazy)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(2, 3))
    assert not isinstance(drawn, LazyTensor)
    assert not reasons


@torch.no_grad()
def test_what_was_left_raises() -> None:
    lazy = LazyRound(lambda reason: None).tensor((2,), (1,), torch.float32, torch.device("cpu"))
    assert repr(lazy) == "LazyTensor(shape=(2,))"  # printing is no exchange
    with pytest.raises(ShardingError, match="after the call that it belongs to had been left"):
        (lazy + 1).sum().item()


@torch.no_grad()
def test_a_change_of_its_own_shape_is_refused() -> None:
    lazy, _ = lazy_of(torch.zeros(2, 3))
    with pytest.raises(ShardingError, match="changes the shape of a result"):
        lazy.unsqueeze_(0)
