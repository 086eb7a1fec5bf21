"""The only room that moves tensors between ranks: all-to-all, ring shift, uneven gather.

Every function is called by all ranks of the axis at the same point of the program. On an axis of size 1 nothing is
sent. Where no library moves tensors of the given device (several ranks sharing one GPU over gloo), they are staged
through host memory. Process-group timeouts bound every wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from omni_sp.mesh import Axis

_DIRECT = {"cpu": ("gloo", "mpi", "fake"), "cuda": ("nccl", "fake")}


def _stages(tensor: torch.Tensor, axis: Axis) -> bool:
    """True where tensors of this device must cross through host memory."""
    library = axis.backends.get(tensor.device.type, "")
    return tensor.device.type != "cpu" and library not in _DIRECT.get(tensor.device.type, ())


class Exchange:
    """An all-to-all under way, in which every pair of ranks has a share of its own.

    Args:
        send: flat, contiguous; the pieces for rank 0, 1, … one behind the other.
        send_sizes: elements for each rank. recv_sizes: elements from each rank. Zeros are fine.
        axis: the ranks.
    """

    def __init__(self, send: torch.Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int], axis: Axis) -> None:
        self._device = send.device
        self._work: dist.Work | None = None
        self._received = send
        if axis.size == 1:
            return
        axis.traffic.add("exchange", (sum(send_sizes) - send_sizes[axis.rank]) * send.element_size())
        # Kept until wait(): a buffer freed earlier would be sent as garbage.
        self._send = send.cpu() if _stages(send, axis) else send
        self._received = torch.empty(sum(recv_sizes), dtype=send.dtype, device=self._send.device)
        # Bytes, so that no library has to know the dtype (gloo does not know bfloat16 everywhere).
        width = send.element_size()
        self._work = dist.all_to_all_single(
            self._received.view(torch.uint8),
            self._send.view(torch.uint8),
            [size * width for size in recv_sizes],
            [size * width for size in send_sizes],
            group=axis.group,
            async_op=True,
        )

    def wait(self) -> torch.Tensor:
        """What came in: flat, the pieces from rank 0, 1, … one behind the other.

        On CUDA only the current stream waits, not the host.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._received.to(self._device)


class Shift:
    """A ring shift under way: this rank's block goes to the next rank, the previous rank's block comes in."""

    def __init__(self, send: torch.Tensor, received: torch.Tensor, axis: Axis) -> None:
        self._received = received
        staged = _stages(send, axis)
        # Kept until wait(): a send buffer that were freed earlier would be sent as garbage.
        self._send = send.cpu() if staged else send
        self._landing = torch.empty_like(received, device="cpu") if staged else received
        following = axis.ranks[(axis.rank + 1) % axis.size]
        previous = axis.ranks[(axis.rank - 1) % axis.size]
        # Both ends know the lengths, so an empty block is skipped by sender and receiver alike.
        operations = []
        if self._send.numel():
            operations.append(dist.P2POp(dist.isend, self._send.view(torch.uint8), following, axis.group))
        if self._landing.numel():
            operations.append(dist.P2POp(dist.irecv, self._landing.view(torch.uint8), previous, axis.group))
        axis.traffic.add("shift", send.numel() * send.element_size())
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> torch.Tensor:
        """The previous rank's block, once it is here and this rank's own has left."""
        for work in self._works:
            work.wait()
        if self._landing is not self._received:
            self._received.copy_(self._landing)
        return self._received


def shift(send: torch.Tensor, recv_size: int, axis: Axis) -> Shift:
    """Start to pass ``send`` (flat, contiguous) to the next rank and take ``recv_size`` elements from the previous."""
    return Shift(send, torch.empty(recv_size, dtype=send.dtype, device=send.device), axis)


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
    staged = _stages(padded, axis)
    source = padded.cpu() if staged else padded
    whole = source.new_empty((axis.size, *source.shape))
    axis.traffic.add("gather", source.numel() * source.element_size() * (axis.size - 1))
    flat = source.reshape(-1).view(torch.uint8)
    dist.all_gather([piece.reshape(-1).view(torch.uint8) for piece in whole], flat, group=axis.group)
    joined = torch.cat([piece[:length] for piece, length in zip(whole, lengths, strict=True)])
    return (joined.to(tensor.device) if staged else joined).movedim(0, dim)


def gather_ints(values: Sequence[int], axis: Axis) -> list[tuple[int, ...]]:
    """Everybody's row of whole numbers, in rank order. All rows have the same number of entries."""
    if axis.size == 1:
        return [tuple(values)]
    device = "cpu" if axis.backends.get("cpu") in _DIRECT["cpu"] else "cuda"
    mine = torch.tensor(list(values), dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(axis.size)]
    axis.traffic.add("gather_ints", mine.numel() * 8 * (axis.size - 1))
    dist.all_gather(rows, mine, group=axis.group)
    return [tuple(row.tolist()) for row in rows]
