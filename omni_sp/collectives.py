"""The only room that moves tensors between ranks: all-to-all, ring shift, uneven gather.

Every function is called by all ranks of the axis at the same point of the program. On an axis of size 1 nothing is
sent. CPU tensors cross between ranks of one machine through shared memory. Where no library moves tensors of the
given device (several ranks sharing one GPU over gloo), they are staged through host memory. Process-group timeouts
bound every wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.shared_memory import SharedMemoryChannel

_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_DIRECT = {"cpu": ("gloo", "mpi", "fake"), "cuda": ("nccl", "fake")}


def _needs_host_staging(device: torch.device, axis: Axis) -> bool:
    """True where tensors of this device must cross through host memory."""
    library = axis.backends.get(device.type, "")
    return device.type != "cpu" and library not in _DIRECT.get(device.type, ())


class Exchange(Protocol):
    """An all-to-all in which every pair of ranks has a share of its own: fill ``places``, ``start``, ``wait``.

    Attributes:
        places: for each rank a flat tensor, to be filled with what goes there before :meth:`start`.
    """

    send_buffers: tuple[torch.Tensor, ...]

    def start(self) -> None:
        """Send what is in ``places``, which must not be touched afterwards."""

    def wait(self) -> torch.Tensor:
        """What came in: flat, the pieces from rank 0, 1, … one behind the other.

        On CUDA only the current stream waits, not the host.
        """


def exchange(
    send_sizes: Sequence[int], recv_sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis
) -> Exchange:
    """Prepare an all-to-all: through shared memory where the ranks have it, else through the group's library.

    Args:
        send_sizes: elements for each rank. recv_sizes: elements from each rank. Zeros are fine; this rank's own entry
            is the same in both.
        dtype, device: of what is sent. axis: the ranks, more than one.
    """
    if device.type == "cpu" and axis.channel is not None:
        return _MemoryExchange(send_sizes, recv_sizes, dtype, axis, axis.channel, "exchange")
    return _GroupExchange(send_sizes, recv_sizes, dtype, device, axis)


class _MemoryExchange:
    """Each rank writes into memory of its own, and copies what is for it out of the others'."""

    def __init__(
        self,
        send_sizes: Sequence[int],
        recv_sizes: Sequence[int],
        dtype: torch.dtype,
        axis: Axis,
        channel: SharedMemoryChannel,
        kind: str,
    ) -> None:
        self._axis, self._kind = axis, kind
        self._received = torch.empty(sum(recv_sizes), dtype=dtype)
        self._into = list(self._received.split(list(recv_sizes)))
        leaving = [0 if rank == axis.rank else size * dtype.itemsize for rank, size in enumerate(send_sizes)]
        self._pending = channel.start(leaving)
        send_buffers = [place.view(dtype) for place in self._pending.send_buffers]
        # What this rank keeps is written where it is wanted, and not copied again.
        send_buffers[axis.rank], self._into[axis.rank] = self._into[axis.rank], send_buffers[axis.rank]
        self.send_buffers = tuple(send_buffers)

    def start(self) -> None:
        self._axis.traffic.add(self._kind, sum(place.nbytes for place in self._pending.send_buffers))
        self._pending.send()

    def wait(self) -> torch.Tensor:
        self._pending.receive([place.view(torch.uint8) for place in self._into])
        return self._received


class _GroupExchange:
    """One ``all_to_all_single`` of the process group."""

    def __init__(
        self,
        send_sizes: Sequence[int],
        recv_sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        axis: Axis,
    ) -> None:
        self._axis, self._device = axis, device
        self._send = torch.empty(sum(send_sizes), dtype=dtype, device=device)
        self._received = torch.empty(
            sum(recv_sizes), dtype=dtype, device="cpu" if _needs_host_staging(device, axis) else device
        )
        self._sizes = [[size * dtype.itemsize for size in sizes] for sizes in (send_sizes, recv_sizes)]
        self.send_buffers = tuple(self._send.split(list(send_sizes)))
        self._work: dist.Work | None = None

    def start(self) -> None:
        send_sizes, recv_sizes = self._sizes
        self._axis.traffic.add("exchange", sum(send_sizes) - send_sizes[self._axis.rank])
        # Kept until wait(): a buffer freed earlier would be sent as garbage.
        self._send = self._send.to(self._received.device)
        # Bytes, so that no library has to know the dtype (gloo does not know bfloat16 everywhere).
        self._work = dist.all_to_all_single(
            self._received.view(torch.uint8),
            self._send.view(torch.uint8),
            recv_sizes,
            send_sizes,
            group=self._axis.group,
            async_op=True,
        )

    def wait(self) -> torch.Tensor:
        assert self._work is not None, "start() comes first"
        self._work.wait()
        return self._received.to(self._device)


class PendingShift(Protocol):
    """A ring shift under way: this rank's block goes to the next rank, the previous rank's block comes in."""

    def wait(self) -> torch.Tensor:
        """The previous rank's block, once it is here and this rank's own may be touched again."""


def shift(send: torch.Tensor, recv_size: int, axis: Axis) -> PendingShift:
    """Start to pass ``send`` (flat, contiguous) to the next rank and take ``recv_size`` elements from the previous."""
    following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    if send.device.type == "cpu" and axis.channel is not None:
        send_sizes, recv_sizes = [0] * axis.size, [0] * axis.size
        send_sizes[following], recv_sizes[previous] = send.numel(), recv_size
        through_memory = _MemoryExchange(send_sizes, recv_sizes, send.dtype, axis, axis.channel, "shift")
        through_memory.send_buffers[following].copy_(send)
        through_memory.start()
        return through_memory
    return _GroupShift(send, recv_size, axis.ranks[following], axis.ranks[previous], axis)


class _GroupShift:
    """A send and a receive of the process group, by global rank."""

    def __init__(self, send: torch.Tensor, recv_size: int, following: int, previous: int, axis: Axis) -> None:
        self._device = send.device
        # Kept until wait(): a send buffer that were freed earlier would be sent as garbage.
        self._send = send.cpu() if _needs_host_staging(send.device, axis) else send
        self._received = self._send.new_empty(recv_size)
        # Both ends know the lengths, so an empty block is skipped by sender and receiver alike.
        operations = []
        if self._send.numel():
            operations.append(dist.P2POp(dist.isend, self._send.view(torch.uint8), following, axis.group))
        if self._received.numel():
            operations.append(dist.P2POp(dist.irecv, self._received.view(torch.uint8), previous, axis.group))
        axis.traffic.add("shift", send.numel() * send.element_size())
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> torch.Tensor:
        for work in self._works:
            work.wait()
        return self._received.to(self._device)


def gather(tensor: torch.Tensor, lengths: Sequence[int], dim: int, axis: Axis) -> torch.Tensor:
    """Join pieces that differ in length along ``dim``; every rank gets the whole, in rank order.

    Args:
        tensor: this rank's piece, ``lengths[axis.rank]`` long along ``dim`` and alike in all other dims.
    """
    if axis.size == 1:
        return tensor
    rows = tensor.movedim(dim, 0)
    longest = max(lengths)
    # The collective wants equal pieces; the rows added here are cut off again below and never seen.
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    staged = _needs_host_staging(padded.device, axis)
    source = padded.cpu() if staged else padded
    whole = source.new_empty((axis.size, *source.shape))
    axis.traffic.add("gather", source.numel() * source.element_size() * (axis.size - 1))
    flat = source.reshape(-1).view(torch.uint8)
    dist.all_gather([piece.reshape(-1).view(torch.uint8) for piece in whole], flat, group=axis.group)
    joined = torch.cat([piece[:length] for piece, length in zip(whole, lengths, strict=True)])
    return (joined.to(tensor.device) if staged else joined).movedim(0, dim)


def all_reduce(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum over all ranks of tensors of one shape; every rank gets the same."""
    if axis.size == 1:
        return tensor
    device = torch.device("cpu") if _needs_host_staging(tensor.device, axis) else tensor.device
    # Sums of 16-bit numbers are made in 32 bit, as kernels do.
    dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    total = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    axis.traffic.add("add_up", total.nbytes)
    dist.all_reduce(total, group=axis.group)
    return total.to(tensor.device, tensor.dtype)


def gather_ints(values: Sequence[int], axis: Axis) -> list[tuple[int, ...]]:
    """Gather whole numbers from all ranks.

    Args:
        values: this rank's numbers; all ranks pass as many.
        axis: the ranks.

    Returns:
        Each rank's numbers, in rank order.
    """
    if axis.size == 1:
        return [tuple(values)]
    device = "cpu" if axis.backends.get("cpu") in _DIRECT["cpu"] else "cuda"
    mine = torch.tensor(list(values), dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(axis.size)]
    axis.traffic.add("gather_ints", mine.numel() * 8 * (axis.size - 1))
    dist.all_gather(rows, mine, group=axis.group)
    return [tuple(row.tolist()) for row in rows]


def require_equal(axis: Axis, message: str, *, gathered: Sequence[int] = (), **values: object) -> list[tuple[int, ...]]:
    """Raise where the ranks hold different values, on all ranks alike. One small exchange.

    Args:
        axis: the ranks.
        message: of the error, a format of ``{name}`` (the first value that differs), ``{values}`` (what each rank
            holds) and ``{ranks}`` (those that differ from the first rank).
        gathered: further numbers that the same exchange gathers; they may differ.
        values: by name, the same names on all ranks. Whole numbers and dtypes are compared and shown as they are, of
            everything else a checksum: of a tensor's shape, dtype and numbers, else of the value's ``repr``.

    Returns:
        Each rank's ``gathered``, in rank order.

    Raises:
        ShardingError: the ranks hold different values.
    """
    rows = gather_ints([*gathered, *map(_comparable, values.values())], axis)
    for name, held in zip(values, zip(*(row[len(gathered) :] for row in rows), strict=True), strict=True):
        if len(set(held)) > 1:
            is_dtype = isinstance(values[name], torch.dtype)
            shown = [str(_DTYPES[value]) if is_dtype else str(value) for value in held]
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in zip(axis.ranks, shown, strict=True))
            ranks = [rank for rank, value in zip(axis.ranks, held, strict=True) if value != held[0]]
            raise ShardingError(message.format(name=name, values=by_rank, ranks=ranks))
    return [row[: len(gathered)] for row in rows]


def _comparable(value: object) -> int:
    """A whole number that differs where the value does."""
    if isinstance(value, torch.dtype):
        return _DTYPES.index(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, torch.Tensor):
        numbers = value.detach().contiguous().cpu()
        content = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
        return zlib.crc32(content, zlib.crc32(repr((tuple(value.shape), value.dtype)).encode()))
    return zlib.crc32(repr(value).encode())
