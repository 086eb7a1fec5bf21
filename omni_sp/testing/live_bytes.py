"""How many bytes of tensors a program holds at its peak, counted as torch makes and frees them, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active.

    Attributes:
        now: bytes that are alive.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, torch.Tensor) and type(x) not in _PLAIN for x in tree_leaves((args, kwargs))):
            return NotImplemented  # to what a tensor that stands for others does, which calls plain operators
        result = func(*args, **(kwargs or {}))
        # Memory that was there before, such as that which ranks share, was not allocated meanwhile.
        before = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor) or type(x) not in _PLAIN or x.is_meta:
                continue
            storage = x.untyped_storage()
            if storage not in before and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes
