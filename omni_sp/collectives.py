"""All that moves tensors between ranks: all-to-all, ring shift, gather of uneven lengths, sum.

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
    """Whether tensors of this device must cross through host memory."""
    library = axis.backends.get(device.type, "")
    return device.type != "cpu" and library not in _DIRECT.get(device.type, ())


class Exchange(Protocol):
    """An all-to-all of different sizes for every pair of ranks: fill ``send_buffers``, ``start``, ``wait``.

    Attributes:
        send_buffers: for each rank a flat tensor, to be filled with what is sent there before `start`.
    """

    send_buffers: tuple[torch.Tensor, ...]

    def start(self) -> None:
        """Send what is in ``send_buffers``, which must not be touched afterwards."""

    def wait(self) -> torch.Tensor:
        """Wait for all ranks. On CUDA only the current stream waits, not the host.

        Returns:
            What was received, flat: from rank 0, 1, … one behind the other.
        """


def exchange(
    send_sizes: Sequence[int], recv_sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis
) -> Exchange:
    """Prepare an all-to-all: through shared memory where the ranks have it, else through the group's library.

    Args:
        send_sizes: number of elements for each rank; zeros are fine.
        recv_sizes: number of elements from each rank; this rank's own entry is the same in both.
        axis: the ranks, more than one.
    """
    if device.type == "cpu" and axis.channel is not None:
        return _SharedMemoryExchange(send_sizes, recv_sizes, dtype, axis, axis.channel, "exchange")
    return _ProcessGroupExchange(send_sizes, recv_sizes, dtype, device, axis)


class _SharedMemoryExchange:
    """Each rank writes into its own memory, and copies what is sent to it out of the other ranks' memory."""

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
        self._recv_buffers = list(self._received.split(list(recv_sizes)))
        num_bytes = [0 if rank == axis.rank else size * dtype.itemsize for rank, size in enumerate(send_sizes)]
        self._pending = channel.prepare(num_bytes)
        send_buffers = [buffer.view(dtype) for buffer in self._pending.send_buffers]
        # What this rank keeps is written straight into what it receives, and not copied again.
        send_buffers[axis.rank], self._recv_buffers[axis.rank] = self._recv_buffers[axis.rank], send_buffers[axis.rank]
        self.send_buffers = tuple(send_buffers)

    def start(self) -> None:
        self._axis.traffic.add(self._kind, sum(buffer.nbytes for buffer in self._pending.send_buffers))
        self._pending.send()

    def wait(self) -> torch.Tensor:
        self._pending.receive([buffer.view(torch.uint8) for buffer in self._recv_buffers])
        return self._received


class _ProcessGroupExchange:
    """One ``all_to_all_single`` of the process group."""

    def __init__(
        self, send_sizes: Sequence[int], recv_sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis
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
        # Sent as bytes, so that no library has to know the dtype (gloo does not know bfloat16 everywhere).
        received, send = self._received.view(torch.uint8), self._send.view(torch.uint8)
        self._work = dist.all_to_all_single(
            received, send, recv_sizes, send_sizes, group=self._axis.group, async_op=True
        )

    def wait(self) -> torch.Tensor:
        assert self._work is not None, "start() comes first"
        self._work.wait()
        return self._received.to(self._device)


class PendingShift(Protocol):
    """A ring shift that was started: this rank's block goes to the next rank, the previous rank's comes here."""

    def wait(self) -> torch.Tensor:
        """Wait until the previous rank's block is here and this rank's own may be touched again.

        Returns:
            The previous rank's block, flat.
        """


def shift(send: torch.Tensor, recv_size: int, axis: Axis) -> PendingShift:
    """Start to send a block to the next rank and to receive one from the previous rank.

    Args:
        send: this rank's block, flat and contiguous.
        recv_size: number of elements of the previous rank's block.
        axis: the ranks, more than one.
    """
    following, previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    if send.device.type == "cpu" and axis.channel is not None:
        send_sizes, recv_sizes = [0] * axis.size, [0] * axis.size
        send_sizes[following], recv_sizes[previous] = send.numel(), recv_size
        pending = _SharedMemoryExchange(send_sizes, recv_sizes, send.dtype, axis, axis.channel, "shift")
        pending.send_buffers[following].copy_(send)
        pending.start()
        return pending
    return _ProcessGroupShift(send, recv_size, axis.ranks[following], axis.ranks[previous], axis)


class _ProcessGroupShift:
    """A send and a receive of the process group, whose peers are global ranks."""

    def __init__(self, send: torch.Tensor, recv_size: int, following: int, previous: int, axis: Axis) -> None:
        self._device = send.device
        # Kept until wait(): a buffer freed earlier would be sent as garbage.
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
    """Concatenate tensors of all ranks, which may differ in length along one dim. Every rank gets the result.

    Args:
        tensor: this rank's, with the same shape on all ranks but for ``dim``.
        lengths: the size of each rank's tensor along ``dim``.

    Returns:
        The tensors in rank order; where the axis has one rank, ``tensor`` itself.
    """
    if axis.size == 1:
        return tensor
    own = tensor.movedim(dim, 0)
    # The collective takes equal shapes only; the padding is cut off again below.
    padded = own.new_zeros((max(lengths), *own.shape[1:]))
    padded[: own.shape[0]] = own
    staged = _needs_host_staging(padded.device, axis)
    source = padded.cpu() if staged else padded
    per_rank = source.new_empty((axis.size, *source.shape))
    axis.traffic.add("gather", source.numel() * source.element_size() * (axis.size - 1))
    flat = source.reshape(-1).view(torch.uint8)
    dist.all_gather([x.reshape(-1).view(torch.uint8) for x in per_rank], flat, group=axis.group)
    joined = torch.cat([x[:length] for x, length in zip(per_rank, lengths, strict=True)])
    return (joined.to(tensor.device) if staged else joined).movedim(0, dim)


def all_reduce(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Add the tensors of all ranks, which have one shape and dtype. 16-bit numbers are added in 32 bit.

    Every rank gets the same sum, a new tensor; where the axis has one rank, it is ``tensor`` itself.
    """
    if axis.size == 1:
        return tensor
    device = torch.device("cpu") if _needs_host_staging(tensor.device, axis) else tensor.device
    dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    total = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    axis.traffic.add("all_reduce", total.nbytes)
    dist.all_reduce(total, group=axis.group)
    return total.to(tensor.device, tensor.dtype)


def gather_ints(values: Sequence[int], axis: Axis) -> list[tuple[int, ...]]:
    """Gather integers, as many from each rank. Each rank's values come back in rank order."""
    if axis.size == 1:
        return [tuple(values)]
    device = "cpu" if axis.backends.get("cpu") in _DIRECT["cpu"] else "cuda"
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    per_rank = [torch.empty_like(own) for _ in range(axis.size)]
    axis.traffic.add("gather_ints", own.numel() * 8 * (axis.size - 1))
    dist.all_gather(per_rank, own, group=axis.group)
    return [tuple(values.tolist()) for values in per_rank]


def require_equal(axis: Axis, message: str, *, gathered: Sequence[int] = (), **values: object) -> list[tuple[int, ...]]:
    """Raise where the ranks hold different values, on all ranks alike. It takes one small exchange.

    Args:
        message: the error's message, a format of ``{name}`` (the first value that differs), ``{values}`` (what each
            rank holds) and ``{ranks}`` (those that differ from the first rank).
        gathered: further integers, which may differ; the same exchange gathers them.
        **values: the values by name, with the same names on all ranks. Integers and dtypes are compared and shown as
            they are. Other values are compared and shown by a checksum: a tensor by that of its shape, dtype and
            elements, everything else by that of its ``repr``.

    Returns:
        Each rank's ``gathered``, in rank order.

    Raises:
        ShardingError: the ranks hold different values.
    """
    per_rank = gather_ints([*gathered, *map(_comparable, values.values())], axis)
    for index, (name, own) in enumerate(values.items(), len(gathered)):
        held = [of_rank[index] for of_rank in per_rank]
        if len(set(held)) > 1:
            names = dict(enumerate(_DTYPES)) if isinstance(own, torch.dtype) else {}
            shown = [str(names.get(value, value)) for value in held]
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in zip(axis.ranks, shown, strict=True))
            ranks = [rank for rank, value in zip(axis.ranks, held, strict=True) if value != held[0]]
            raise ShardingError(message.format(name=name, values=by_rank, ranks=ranks))
    return [of_rank[: len(gathered)] for of_rank in per_rank]


def _comparable(value: object) -> int:
    """An integer that differs where the value does."""
    if isinstance(value, torch.dtype):
        return _DTYPES.index(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return zlib.crc32(content, zlib.crc32(repr((tuple(value.shape), value.dtype)).encode()))
    return zlib.crc32(repr(value).encode())
