"""What a replay need not do again is left out, and what is left gives the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_sp.sharding.replay.recorder import Recorder
from omni_sp.sharding.replay.tape import Tape


def recorded(function: Callable[..., Any], *arguments: Tensor) -> Tape:
    """A recording of a function, which gives what the function gives also for other numbers."""
    recorder = Recorder(arguments, [False] * len(arguments), [])
    with torch.no_grad():
        tape = Tape(recorder, arguments, recorder.record(lambda: function(*arguments)))
        for others in (arguments, [x.flip(0) for x in arguments]):
            wanted, found = function(*others), tape.replay(others, [])
            pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
            assert all(torch.equal(one, other) for one, other in pairs)
    return tape


def operations(tape: Tape) -> Counter[str]:
    """What the recording calls, by name."""
    return Counter(node.target.__name__.partition(".")[0] for node in tape.graph.nodes if node.op == "call_function")


X = torch.randn(4, 6)


def test_what_is_the_same_is_computed_once() -> None:
    tape = recorded(lambda x: x[:2].sin() * x[:2].sin() + torch.stack(x[:2].sin().unbind()), X)
    assert operations(tape)["sin"] == 1
    assert operations(tape)["unbind"] == 1


def test_a_view_of_the_shape_that_it_has_is_no_operation() -> None:
    tape = recorded(lambda x: x.view(4, 6).view_as(x).reshape(4, 6).cos(), X)
    assert operations(tape) == {"cos": 1}


def test_what_is_made_of_plain_numbers_is_kept() -> None:
    def rotate(x: Tensor) -> Tensor:
        angles = torch.arange(6.0) / torch.tensor([1.0, 2.0] * 3)
        return x * angles.sin() + x * (torch.arange(6.0) / torch.tensor([1.0, 2.0] * 3)).sin()

    assert operations(recorded(rotate, X)) == {"mul": 1, "add": 1}


def test_numbers_that_are_equal_and_not_the_same_stay_apart() -> None:
    tape = recorded(lambda x: torch.copysign(x, torch.tensor(0.0)) + 2 * torch.copysign(x, torch.tensor(-0.0)), X)
    assert operations(tape)["copysign"] == 2
    assert operations(recorded(lambda x: x.pow(2) + x.pow(2.0), X))["pow"] == 2


@pytest.mark.parametrize("written", ["add_", "mul_"])
def test_what_is_written_to_is_made_each_time(written: str) -> None:
    def write(x: Tensor) -> Tensor:
        one, other, constant = x + 1, x + 1, torch.ones(6)
        getattr(one[0], written)(2)
        getattr(constant, written)(2)
        return one * other * constant

    tape = recorded(write, X)
    assert operations(tape)["add"] == 2
    assert sum(operations(tape)[name] for name in (written, written.strip("_"))) >= 1


def test_results_share_no_memory() -> None:
    tape = recorded(lambda x: (x + 1, x + 1, torch.ones(6)), X)
    one, other, constant = tape.replay([X], [])
    assert one.data_ptr() != other.data_ptr()
    constant.add_(1)
    assert torch.equal(tape.replay([X], [])[2], torch.ones(6))


def test_random_numbers_are_drawn_each_time() -> None:
    recorder = Recorder([X], [False], [])
    with torch.no_grad():
        tape = Tape(recorder, [X], recorder.record(lambda: torch.rand_like(X) - torch.rand_like(X) + torch.rand(6)))
        assert operations(tape)["rand_like"] + operations(tape)["rand"] == 3
        assert not torch.equal(tape.replay([X], []), tape.replay([X], []))


def test_what_is_large_is_not_kept_for_a_second_use() -> None:
    large = torch.zeros(1024, 1024)
    assert operations(recorded(lambda x: x.sin() + x.sin(), large))["sin"] == 2
    assert operations(recorded(lambda x: x[:1].sin() + x[:1].sin(), large))["narrow"] <= 1


def test_other_operators_are_left_as_they_are() -> None:
    torch.library.define("omni_sp_test::note", "(Tensor x) -> Tensor")
    calls = []

    @torch.library.impl("omni_sp_test::note", "CPU")
    def note(x: Tensor) -> Tensor:
        calls.append(1)
        return x + 1

    recorded(lambda x: torch.ops.omni_sp_test.note(x) + torch.ops.omni_sp_test.note(x), X)
    assert len(calls) == 2 * 5
