"""The tensors that a weight is made of, and their bytes: in memory, in a file, or among the bytes that ranks share."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_STORED = "_omni_sp_stored"
_ELEMENTS_AT_ONCE = 2**20


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is still in a file, one element after the other.

    Attributes:
        offset: where its bytes begin in the file.
        stored: the dtype that it has there.
        dtype: the dtype that it is to have.
        device: where it is to be.
        quantise: makes of the whole weight the one that the model is to have; None where that is the weight itself.
    """

    file: str
    offset: int
    stored: torch.dtype
    dtype: torch.dtype
    device: torch.device
    quantise: Callable[[torch.Tensor], torch.nn.Parameter] | None = None

    def whole(self, like: torch.Tensor) -> Any:
        """The weight with its numbers, quantised where it is to be.

        Args:
            like: of its shape; where it is a parameter, so is the weight.

        Raises:
            OSError: as of ``read_into``.
        """
        content = torch.empty(like.shape, dtype=self.dtype, device=self.device)
        self.read_into(content.view(-1))
        if self.quantise is not None:
            return self.quantise(content)
        is_parameter = isinstance(like, torch.nn.Parameter)
        return torch.nn.Parameter(content, requires_grad=like.requires_grad) if is_parameter else content

    def read_into(self, target: torch.Tensor, first: int = 0) -> None:
        """Read as many elements as there are in ``target``, which is flat, from number ``first`` on.

        Nothing else of the file is read, and little at once.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        for place in range(0, target.numel(), _ELEMENTS_AT_ONCE):
            some = target[place : place + _ELEMENTS_AT_ONCE]
            some.copy_(self._read(first + place, some.numel()))

    def _read(self, first: int, count: int) -> torch.Tensor:
        # Memory of its own goes back to the system at once; the heap would keep holes between the parts that stay.
        content = mmap.mmap(-1, count * self.stored.itemsize)
        with open(self.file, "rb", buffering=0) as opened:
            opened.seek(self.offset + first * self.stored.itemsize)
            if opened.readinto(content) != len(content):
                raise OSError(f"{self.file} ends within a weight")
        return torch.frombuffer(content, dtype=self.stored)

    def without_numbers(self, parameter: torch.Tensor) -> torch.nn.Parameter:
        """A parameter in its dtype and on its device, in memory that nobody has written to.

        Args:
            parameter: of its shape.
        """
        empty = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        return torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)


def mark_stored(parameter: torch.Tensor, stored: StoredWeight) -> None:
    """Note where the numbers of a parameter on the meta device are, for `WeightShards` to read its part of them."""
    setattr(parameter, _STORED, stored)


def stored_weight(parameter: torch.Tensor | None) -> StoredWeight | None:
    """Where the numbers of a parameter are; None where it has them itself."""
    found: StoredWeight | None = getattr(parameter, "__dict__", {}).get(_STORED)
    return found


def leaves_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight, or the tensors that a quantised one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from leaves_of(getattr(weight, name))


def can_be_cut(x: torch.Tensor, shared: set[int], device: torch.device) -> bool:
    """Whether a tensor's memory is its own, and has no gaps."""
    if x.is_meta or x.layout != torch.strided or x.device != device or not x.numel():
        return False
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(x.detach())
    return dense and shared.isdisjoint((id(x), x.untyped_storage().data_ptr()))


@dataclass
class Leaf:
    """A tensor with memory of its own: a weight, or a part of a quantised one.

    Attributes:
        start: where its bytes begin among the block's.
        stored: the file that they are still in; None where the tensor has them.
    """

    tensor: torch.Tensor
    start: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    stored: StoredWeight | None = None

    def write(self, part: torch.Tensor, start: int) -> None:
        """Copy those of its bytes that belong to the part of the block's bytes from ``start`` on.

        No element is in two parts: parts begin at multiples of any element's size.
        """
        width = self.dtype.itemsize
        first, last = max(self.start, start), min(self.start + self.shape.numel() * width, start + part.numel())
        if first >= last:
            return
        target = part[first - start : last - start].view(self.dtype)
        begin = (first - self.start) // width
        if self.stored is None:
            flat = self.tensor.detach().as_strided((self.shape.numel(),), (1,))
            target.copy_(flat[begin : begin + target.numel()])
        else:
            self.stored.read_into(target, begin)

    def read(self, whole: torch.Tensor, apart: bool) -> None:
        """Let it be the bytes that were gathered."""
        count = self.shape.numel()
        content = whole[self.start : self.start + count * self.dtype.itemsize].view(self.dtype)
        self._set((content.clone() if apart else content).as_strided(self.shape, self.stride))

    def free(self) -> None:
        """Let go of its memory. What others hold of it stays: the storage is left, not resized."""
        self._set(torch.empty(0, dtype=self.dtype, device=self.tensor.device))

    def _set(self, data: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self.tensor.data = data
