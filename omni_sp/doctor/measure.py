"""What ranks measure: exchanges by size, attention kernels and a linear layer at a model's shapes, copies of memory.

The functions run on every rank at the same time, see `omni_sp.doctor.ranks`: ranks that share cores, a bus or a GPU
measure what is left to each of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from omni_sp.attention import TunedShape
from omni_sp.attention.kernels import can_serve, exact_kernels, kernel_call, select_kernel
from omni_sp.attention.tuning import kernel_times, run_time
from omni_sp.collectives import exchange, gather_ints, shift
from omni_sp.config import DiffusionParallelConfig
from omni_sp.doctor.ranks import Rank
from omni_sp.mesh import Axis, ParallelMesh

SIZES = {"cpu": (1 << 10, 1 << 16, 1 << 20, 1 << 23), "cuda": (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 27)}
"""Bytes that a rank sends to others, by the type of its device."""
_ROUNDS = 3
_ROUND_S = 0.05
_MOST_MESSAGES = 50
# Operations that are timed at once at the most: what a device does in a blink.
_OPERATIONS = {"cpu": 2e9, "cuda": 2e13}
_COPIED = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class Shape:
    """Where a model spends its time.

    Attributes:
        model: its name.
        tokens: of the sequence that ranks share.
        heads: of its attention.
        head_dim: channels of a head.
        attention_share: the part of its operations that its attention has.
    """

    model: str
    tokens: int
    heads: int
    head_dim: int
    attention_share: float


QWEN_IMAGE = Shape("Qwen-Image", 7017, 24, 128, 0.276)
"""At its published size, 1328 x 1328; `omni_sp.planner.model_cost` counts the same."""


@dataclass(frozen=True)
class Transfers:
    """What one rank found of exchanges: (bytes sent, seconds) by size.

    Attributes:
        transport: what moves tensors: "shared memory", or a library.
        exchange: all-to-alls.
        ring: ring shifts.
    """

    transport: str
    exchange: tuple[tuple[int, float], ...]
    ring: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Speed:
    """What one rank found of its device.

    Attributes:
        device: its name.
        tokens: of the attention and the linear layer that were timed, so many that it is not for long.
        heads: of the attention, this rank's.
        dtype: of both.
        kernels: attention kernel -> (seconds, 10^12 operations a second).
        auto: the kernel that "auto" takes for the model's own shape.
        linear_tflops: 10^12 operations a second.
        memory_gb: of the device, in 10^9 bytes; of a CPU this rank's part.
        memory_gb_per_s: what a copy in it reads and writes.
        host_gb_per_s: between it and its host.
    """

    device: str
    tokens: int
    heads: int
    dtype: str
    kernels: dict[str, tuple[float, float]]
    auto: str
    linear_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    host_gb_per_s: float


def transfers(rank: Rank) -> Transfers:
    """Time an all-to-all and a ring shift over all ranks, for each size."""
    size = rank.mesh.world_size
    all_to_all = ParallelMesh(DiffusionParallelConfig(ulysses_degree=size)).ulysses
    ring = ParallelMesh(DiffusionParallelConfig(ring_degree=size)).ring
    exchanged, shifted = [], []
    for num_bytes in SIZES[rank.device.type]:
        exchanged.append(_exchange_time(num_bytes, rank.device, all_to_all))
        shifted.append(_shift_time(num_bytes, rank.device, ring))
    library = all_to_all.backends.get(rank.device.type, "gloo")
    transport = "shared memory" if rank.device.type == "cpu" and all_to_all.channel is not None else library
    return Transfers(transport, tuple(exchanged), tuple(shifted))


def _exchange_time(num_bytes: int, device: torch.device, axis: Axis) -> tuple[int, float]:
    each = max(1, num_bytes // 4 // (axis.size - 1))
    sizes = [each] * axis.size
    data = torch.zeros(each * axis.size, device=device)

    def run() -> None:
        pending = exchange(sizes, sizes, torch.float32, device, axis)
        pending.fill([data])
        pending.start()
        pending.wait()

    return 4 * each * (axis.size - 1), _together(run, device, axis)


def _shift_time(num_bytes: int, device: torch.device, axis: Axis) -> tuple[int, float]:
    data = torch.zeros(num_bytes // 4, device=device)
    return num_bytes, _together(lambda: shift(data, data.numel(), axis).wait(), device, axis)


def _together(run: Callable[[], object], device: torch.device, axis: Axis) -> float:
    """Seconds of one exchange, of several after each other; all ranks begin together, and make equally many."""
    run()
    began = time.perf_counter()
    run()
    _wait_for(device)
    # Rank 0 decides for all how many there are.
    count = int(min(max(_ROUND_S / max(time.perf_counter() - began, 1e-6), 3), _MOST_MESSAGES))
    count = gather_ints([count], axis)[0][0]
    seconds = []
    for _ in range(_ROUNDS):
        gather_ints([0], axis)
        began = time.perf_counter()
        for _ in range(count):
            run()
        _wait_for(device)
        seconds.append((time.perf_counter() - began) / count)
    return min(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(rank: Rank, shape: Shape) -> Speed:
    """Time the attention kernels, a linear layer and copies of memory; all ranks at once.

    Args:
        rank: this one.
        shape: the model's.
    """
    device = rank.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = -(-shape.heads // rank.mesh.world_size)
    operations = 4 * heads * shape.head_dim
    most = int((_OPERATIONS[device.type] / operations) ** 0.5)
    tokens = min(shape.tokens, most)
    tuned = TunedShape(1, tokens, tokens, heads, heads, shape.head_dim, dtype, False, False)
    query = torch.empty(1, 1, heads, shape.head_dim, dtype=dtype, device=device)
    call = kernel_call(query, None, is_causal=False, num_tokens=shape.tokens)
    gather_ints([0], rank.mesh.world)
    times = kernel_times(tuned, [name for name in exact_kernels() if can_serve(name, call)], device)
    kernels = {
        name: (nanoseconds / 1e9, operations * tokens**2 / nanoseconds / 1e3) for name, nanoseconds in times.items()
    }
    gather_ints([0], rank.mesh.world)
    copied, from_host = _copies(device)
    return Speed(
        _device_name(device),
        tokens,
        heads,
        str(dtype).removeprefix("torch."),
        kernels,
        select_kernel("auto", call).name,
        _linear(shape, device, dtype),
        _memory(device) / 1e9 / (rank.mesh.world_size if device.type == "cpu" else 1),
        copied,
        from_host,
    )


def _linear(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    channels = shape.heads * shape.head_dim
    tokens = min(shape.tokens, max(64, int(_OPERATIONS[device.type] / (2 * channels**2))))
    tokens_x, weight = torch.randn(tokens, channels, device=device), torch.randn(channels, channels, device=device)
    x, weight = tokens_x.to(dtype), weight.to(dtype)
    nanoseconds = _least(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * tokens * channels**2 / nanoseconds / 1e3


def _copies(device: torch.device) -> tuple[float, float]:
    """10^9 bytes a second that a copy on the device reads and writes, and that cross from the host."""
    num_bytes = _COPIED[device.type]
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    own = 2 * num_bytes / _least(lambda: target.copy_(source), device)
    if device.type == "cpu":
        return own, own / 2
    host = torch.zeros(num_bytes, dtype=torch.uint8).pin_memory()
    return own, num_bytes / _least(lambda: target.copy_(host, non_blocking=True), device)


def _least(run: Callable[[], object], device: torch.device) -> int:
    """Nanoseconds, the least of some runs; what is made once is not in them."""
    run()
    return max(1, min(run_time(run, device) for _ in range(_ROUNDS)))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
