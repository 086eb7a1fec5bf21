"""A call that one rank alone leaves by an exception: the others hear of it, where they would wait for that rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from omni_sp.mesh import ParallelMesh
from omni_sp.shared_memory import Loop, SharedMemoryChannel


def watch_loops(pipe: Any, mesh: ParallelMesh) -> Callable[[], None]:
    """Tell the other ranks of an exception that ends the denoising loop of a call on this one.

    A callback may raise on one rank, or somebody may press Ctrl-C there: the others would wait for it until the process
    group's timeout. Every pipeline of diffusers has ``with self.progress_bar(...)`` around its loop, which sees all
    exceptions; the instance's attribute is replaced. It goes by shared memory's pipes, which the ranks of one machine
    have.

    Returns:
        What undoes it.
    """
    channels = {
        id(axis.channel): axis.channel for axis in (mesh.sequence, mesh.cfg, mesh.ring, mesh.ulysses, mesh.world)
    }
    reached = [channel for channel in channels.values() if channel is not None]
    original = getattr(pipe, "progress_bar", None)
    if isinstance(pipe, torch.nn.Module) or not callable(original) or not reached:
        return lambda: None
    before = vars(pipe).get("progress_bar")

    def progress_bar(*args: Any, **kwargs: Any) -> _WatchedBar:
        return _WatchedBar(original(*args, **kwargs), reached)

    def undo() -> None:
        if vars(pipe).get("progress_bar") is not progress_bar:
            return  # somebody has put another one there
        del pipe.progress_bar
        if before is not None:
            pipe.progress_bar = before

    pipe.progress_bar = progress_bar
    return undo


class _WatchedBar:
    """A pipeline's own progress bar, which also sees how the block around it ends."""

    def __init__(self, bar: Any, channels: list[SharedMemoryChannel]) -> None:
        self._bar = bar
        self._loops: list[tuple[SharedMemoryChannel, Loop]] = [(channel, channel.begin_loop()) for channel in channels]

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        if error is not None:
            for channel, loop in self._loops:
                channel.leave_loop(loop, error)
        return self._bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
