"""What the rules tell a recording, see ``omni_sp.sharding.replay``: which calls it must keep as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Recording(Protocol):
    """Takes down the operations of one block."""

    def call(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Call a function, and take it down as one operation."""

    def will_read(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Note that every replay looks at a tensor's numbers, which come from the arguments that it returns.

        None where they also come from elsewhere.
        """


_CURRENT: ContextVar[Recording | None] = ContextVar("omni_sp_recording", default=None)


def current_recording() -> Recording | None:
    """The recording that is running in this context."""
    return _CURRENT.get()


@contextmanager
def activate_recording(recording: Recording) -> Iterator[None]:
    """Make ``recording`` the running one."""
    token = _CURRENT.set(recording)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def as_one_operation(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function whose inside a recording must not take apart: an exchange between ranks, or attention.

    Args:
        function: gives a plain tensor of plain tensors and of what the placements say.
        *args: of the function.
        **kwargs: of the function.
    """
    recording = _CURRENT.get()
    return function(*args, **kwargs) if recording is None else recording.call(function, args, kwargs)


def will_read(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """Say that an operation looks at a tensor's numbers whenever it is called.

    Returns:
        In a recording, the arguments without which the numbers are the same; None where that is not known.
    """
    recording = _CURRENT.get()
    return None if recording is None else recording.will_read(tensor)


def as_constant(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor of ours that only depends on placements, so that a recording may keep it."""
    tensor.__dict__["_omni_sp_constant"] = True
    return tensor


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether `as_constant` marked it."""
    return "_omni_sp_constant" in tensor.__dict__
