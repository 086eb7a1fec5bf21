"""All that moves tensors between ranks: all-to-all, ring shift, gather of uneven lengths, sum.

Every function is called by all ranks of the axis at the same point of the program. On an axis of size 1 nothing is
sent. CPU tensors cross between ranks of one machine through shared memory. Where no library moves tensors of the
given device (several ranks sharing one GPU over gloo), they are staged through host memory. Process-group timeouts
bound every wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Protocol

import torch
import torch.distributed as dist

from omni_sp.checksum import as_integer, describe_integer
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.shared_memory import MAX_FEW, SharedMemoryChannel

# torch 2.13 has renamed it.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIRECT = {"cpu": ("gloo", "mpi", "fake"), "cuda": ("nccl", "fake")}


def _needs_host_staging(device: torch.device, axis: Axis) -> bool:
    """Whether tensors of this device must cross through host memory."""
    return device.type != "cpu" and axis.backends.get(device.type, "") not in _DIRECT.get(device.type, ())


class Exchange(Protocol):
    """Messages of different sizes between all ranks of an axis: `fill`, `start`, `wait`."""

    @property
    def send_buffers(self) -> tuple[torch.Tensor, ...]:
        """For each rank a flat tensor, to be filled with what is sent there, instead of `fill`."""

    def fill(self, parts: Sequence[torch.Tensor], dim: int = 0, start: int = 0) -> None:
        """Write into what is sent, which is flat: the messages to rank 0, 1, … one behind the other.

        Args:
            parts: what is written is these tensors, concatenated. They must not be touched before `wait`.
            dim: along which they are concatenated.
            start: the element that is written first.
        """

    def start(self) -> None:
        """Send what was written, which must not be touched afterwards."""

    def wait(self) -> torch.Tensor:
        """Wait for all ranks. On CUDA only the current stream waits, not the host.

        Returns:
            What was received, contiguous: from rank 0, 1, … one behind the other. It is flat, or shaped like what
            `fill` wrote.
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
        return _SharedMemoryExchange("exchange", send_sizes, recv_sizes, dtype, axis, axis.channel)
    return _AllToAll(send_sizes, recv_sizes, dtype, device, axis)


def all_gather(sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis) -> Exchange:
    """Prepare to send one message to all ranks; it is written once.

    Args:
        sizes: number of elements of each rank's message; zeros are fine.
        axis: the ranks, more than one.
    """
    if device.type == "cpu" and axis.channel is not None:
        return _SharedMemoryExchange("gather", [sizes[axis.rank]] * axis.size, sizes, dtype, axis, axis.channel)
    return _AllGather(sizes, dtype, device, axis)


def _write(parts: Sequence[torch.Tensor], dim: int, flat: torch.Tensor, start: int) -> None:
    """Concatenate tensors into a flat one, from ``start`` on."""
    size = list(parts[0].shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    stride = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    out = flat.as_strided(size, stride, flat.storage_offset() + start)
    if len(parts) == 1:
        out.copy_(parts[0])
    else:
        torch.cat(list(parts), dim, out=out)


class _SharedMemoryExchange:
    """Each rank writes into its own memory, and copies what is sent to it out of all ranks' memory.

    Args:
        kind: "gather" where all ranks get the same message, which is written once; "exchange" or "shift".
    """

    def __init__(
        self,
        kind: str,
        send_sizes: Sequence[int],
        recv_sizes: Sequence[int],
        dtype: torch.dtype,
        axis: Axis,
        channel: SharedMemoryChannel,
    ) -> None:
        self._kind, self._axis, self._dtype = kind, axis, dtype
        self._send_sizes, self._recv_sizes = list(send_sizes), list(recv_sizes)
        num_bytes = [size * dtype.itemsize for size in send_sizes]
        self._pending = channel.prepare(num_bytes, is_same_for_all=kind == "gather")
        self._num_bytes = sum(num_bytes) - num_bytes[axis.rank]
        self._send = self._pending.memory(dtype)

    @property
    def send_buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._send[: sum(self._send_sizes)].split(self._send_sizes))

    def fill(self, parts: Sequence[torch.Tensor], dim: int = 0, start: int = 0) -> None:
        _write(parts, dim, self._send, start)

    def start(self) -> None:
        self._axis.traffic.add(self._kind, self._num_bytes)
        self._pending.send()

    def wait(self) -> torch.Tensor:
        return self._pending.receive(self._recv_sizes, self._dtype)


class _ProcessGroupExchange:
    """What `_AllToAll` and `_AllGather` share: tensors on the device, and staged ones where the library needs them."""

    def __init__(self, num_sent: int, dtype: torch.dtype, device: torch.device, axis: Axis) -> None:
        self._axis, self._dtype, self._device, self._num_sent = axis, dtype, device, num_sent
        self._is_staged = _needs_host_staging(device, axis)
        self._send: torch.Tensor | None = None
        self._received: torch.Tensor
        self._work: dist.Work | None = None

    def fill(self, parts: Sequence[torch.Tensor], dim: int = 0, start: int = 0) -> None:
        if sum(part.numel() for part in parts) == self._num_sent:
            self._send = parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim)
        elif self._num_sent:
            _write(parts, dim, self._to_send(), start)

    def _to_send(self) -> torch.Tensor:
        """What is sent, contiguous: flat, unless `fill` wrote all of it at once."""
        if self._send is None:
            self._send = torch.empty(self._num_sent, dtype=self._dtype, device=self._device)
        return self._send

    def _tensors(self, shape: Sequence[int], shape_received: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the library sends, and where it writes what it receives."""
        # Both are kept until wait(): a buffer freed earlier would be sent as garbage.
        self._send = self._to_send().cpu() if self._is_staged else self._to_send()
        self._received = self._send.new_empty(shape_received)
        send = self._send if self._send.shape == shape else self._send.view(shape)
        library = self._axis.backends.get(send.device.type)
        if library in ("nccl", "fake") and self._dtype in _FLOATS:
            return send, self._received
        # As bytes, so that no library has to know the dtype (gloo does not know bfloat16 everywhere). The new last dim
        # leaves the first one as it is.
        return send.unsqueeze(-1).view(torch.uint8), self._received.unsqueeze(-1).view(torch.uint8)

    def wait(self) -> torch.Tensor:
        assert self._work is not None, "start() comes first"
        self._work.wait()
        return self._received.to(self._device) if self._is_staged else self._received


class _AllToAll(_ProcessGroupExchange):
    """One ``all_to_all_single`` of the process group."""

    def __init__(
        self, send_sizes: Sequence[int], recv_sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis
    ) -> None:
        super().__init__(sum(send_sizes), dtype, device, axis)
        self._send_sizes, self._recv_sizes = list(send_sizes), list(recv_sizes)

    @property
    def send_buffers(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._to_send().split(self._send_sizes))

    def start(self) -> None:
        num_bytes = (self._num_sent - self._send_sizes[self._axis.rank]) * self._dtype.itemsize
        self._axis.traffic.add("exchange", num_bytes)
        if self._send_sizes == self._recv_sizes and self._num_sent:
            # With evenly split shares the tensors go as they are. Their first dim counts the same for all messages.
            send, received = self._tensors(self._to_send().shape, self._to_send().shape)
            row = self._num_sent // send.shape[0]
            send_sizes = recv_sizes = [size // row for size in self._send_sizes]
        else:
            send, received = self._tensors((self._num_sent,), (sum(self._recv_sizes),))
            send_sizes, recv_sizes = self._send_sizes, self._recv_sizes
        self._work = dist.all_to_all_single(
            received, send, recv_sizes, send_sizes, group=self._axis.group, async_op=True
        )


class _AllGather(_ProcessGroupExchange):
    """One ``all_gather_into_tensor`` of the process group, which takes equal sizes: shorter messages are padded."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, axis: Axis) -> None:
        super().__init__(max(sizes), dtype, device, axis)
        self._sizes, self._is_even = list(sizes), min(sizes) == max(sizes)

    @property
    def send_buffers(self) -> tuple[torch.Tensor, ...]:
        return (self._to_send()[: self._sizes[self._axis.rank]],) * self._axis.size

    def start(self) -> None:
        size = self._axis.size
        self._axis.traffic.add("gather", self._num_sent * self._dtype.itemsize * (size - 1))
        rows, *rest = self._to_send().shape if self._is_even else (self._num_sent,)
        send, received = self._tensors((rows, *rest), (size * rows, *rest))
        self._work = _all_gather_single(received, send, group=self._axis.group, async_op=True)

    def wait(self) -> torch.Tensor:
        received = super().wait()
        if self._is_even:
            return received
        return torch.cat([x[:size] for x, size in zip(received.split(self._num_sent), self._sizes, strict=True)])


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
        pending = _SharedMemoryExchange("shift", send_sizes, recv_sizes, send.dtype, axis, axis.channel)
        pending.fill([send])
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
    row = math.prod(own.shape[1:])
    pending = all_gather([length * row for length in lengths], tensor.dtype, tensor.device, axis)
    pending.fill([own.reshape(-1)])
    pending.start()
    return pending.wait().view(sum(lengths), *own.shape[1:]).movedim(0, dim)


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
    if device.type == "cpu" and axis.channel is not None:
        total = reduce(torch.add, axis.channel.gather(total))  # in the order of the ranks, so that all round alike
    else:
        dist.all_reduce(total, group=axis.group)
    return total.to(tensor.device, tensor.dtype)


def gather_ints(values: Sequence[int], axis: Axis) -> list[tuple[int, ...]]:
    """Gather integers, as many from each rank. Each rank's values come back in rank order."""
    if axis.size == 1:
        return [tuple(values)]
    axis.traffic.add("gather_ints", len(values) * 8 * (axis.size - 1))
    if axis.channel is not None and len(values) <= MAX_FEW:
        return axis.channel.gather_few(values)
    device = "cpu" if axis.backends.get("cpu") in _DIRECT["cpu"] else "cuda"
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    if device == "cpu" and axis.channel is not None:
        per_rank = axis.channel.gather(own)
    else:
        per_rank = [torch.empty_like(own) for _ in range(axis.size)]
        dist.all_gather(per_rank, own, group=axis.group)
    return [tuple(values.tolist()) for values in per_rank]


def gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """Gather a few kB from each rank, in rank order. It takes two exchanges."""
    lengths = [length for (length,) in gather_ints([len(data)], axis)]
    padded = bytearray(data.ljust(-(-max(lengths) // 8) * 8, b"\0"))
    per_rank = gather_ints(torch.frombuffer(padded, dtype=torch.int64).tolist() if padded else [], axis)
    return [torch.tensor(words).numpy().tobytes()[:length] for words, length in zip(per_rank, lengths, strict=True)]


def gather_texts(text: str, axis: Axis) -> list[str]:
    """Gather a text from each rank, in rank order; for errors, since it takes two exchanges."""
    return [content.decode() for content in gather_bytes(text.encode(), axis)]


def require_equal(axis: Axis, message: str, *, gathered: Sequence[int] = (), **values: object) -> list[tuple[int, ...]]:
    """Raise where the ranks hold different values, on all ranks alike. It takes one small exchange.

    Args:
        message: the error's message, a format of ``{name}`` (the first value that differs), ``{values}`` (what each
            rank holds) and ``{ranks}`` (those that differ from the first rank).
        gathered: further integers, which may differ; the same exchange gathers them.
        **values: the values by name, with the same names on all ranks. Numbers and dtypes are compared and shown as
            they are. Other values are compared and shown by a checksum: tensors, arrays and PIL images by that of their
            shape, dtype or mode, and elements, lists and dicts by those of their items, everything else by that of its
            ``repr``.

    Returns:
        Each rank's ``gathered``, in rank order.

    Raises:
        ShardingError: the ranks hold different values.
    """
    per_rank = gather_ints([*gathered, *map(as_integer, values.values())], axis)
    for index, (name, own) in enumerate(values.items(), len(gathered)):
        held = [of_rank[index] for of_rank in per_rank]
        if len(set(held)) > 1:
            by_rank = ", ".join(
                f"rank {rank}: {describe_integer(x, own)}" for rank, x in zip(axis.ranks, held, strict=True)
            )
            ranks = [rank for rank, value in zip(axis.ranks, held, strict=True) if value != held[0]]
            raise ShardingError(message.format(name=name, values=by_rank, ranks=ranks))
    return [of_rank[: len(gathered)] for of_rank in per_rank]
