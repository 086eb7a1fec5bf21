"""Which device each rank gets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from omni_sp.config import DiffusionParallelConfig
from omni_sp.errors import ConfigError
from omni_sp.machine import memory_bytes, num_cores
from omni_sp.validation import shown

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_RANK_BYTES, _ALWAYS = 300_000_000, 8
"""What a rank takes at the least, for its imports; and how many may always be tried."""
_ON_CPU = 'run on the CPU with device="cpu" (--device cpu)'


def check_device_name(device: str | None) -> None:
    """Refuse what is no device, before torch is imported."""
    if device is not None and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise ConfigError(f'device={shown(device)}: give "cpu", "cuda", "cuda:0" and so on, or None to choose')


def rank_devices(device: str | None, config: DiffusionParallelConfig, replica: int = 0) -> list[str]:
    """One device for each rank of a replica on this machine.

    None and "cuda" give every rank a GPU of its own (None: the CPU where there is no GPU). "cuda:N" puts all ranks on
    that one GPU, where they talk through host memory: exact, for trying things out, not fast.

    Raises:
        ConfigError: fewer GPUs than ranks, no such GPU, or more ranks than this machine has memory for.
    """
    one, num_gpus = shared_device(device)
    size, replicas = config.world_size, config.data_parallel_size
    if one is not None:
        if size * replicas > (most := max(_ALWAYS, memory_bytes() // _RANK_BYTES)):
            raise ConfigError(
                f"{config.full_equation} are more processes than this machine has memory for, which is {most} without "
                "any weights: lower the degrees"
            )
        return [one] * size
    if num_gpus < size * replicas:
        raise ConfigError(
            f"{config.full_equation} need {_gpus(size * replicas)}, one each, and this machine has {num_gpus}: lower "
            f"the degrees, or {_ON_CPU}"
        )
    return [f"cuda:{index}" for index in range(replica * size, (replica + 1) * size)]


def joined_device(device: str | None, config: DiffusionParallelConfig) -> str:
    """The device of this rank in a program that torchrun started: the GPU of its LOCAL_RANK, or the CPU.

    Raises:
        ConfigError: fewer GPUs on this machine than ranks on it, or no such GPU.
    """
    one, num_gpus = shared_device(device)
    if one is not None:
        return one
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(config.world_size)))
    if local_rank >= num_gpus:
        raise ConfigError(
            f"{config.equation}, {local_size} of them on this machine, which has {_gpus(num_gpus)}: start fewer "
            f"ranks on it, or {_ON_CPU}"
        )
    return f"cuda:{local_rank}"


def shared_device(device: str | None) -> tuple[str | None, int]:
    """The one device that all ranks share, if they do, and the number of GPUs here."""
    import torch

    check_device_name(device)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device is None and num_gpus == 0):
        return "cpu", num_gpus
    if device is None or ":" not in device:
        return None, num_gpus
    if int(device.split(":")[1]) >= num_gpus:
        raise ConfigError(f"no device {device}: this machine has {_gpus(num_gpus)}; {_ON_CPU}")
    return device, num_gpus


def group_backend(devices: Sequence[tuple[str, str]]) -> str:
    """What moves tensors between ranks on these (machine, device). NCCL refuses two on one GPU; gloo serves both."""
    if devices[0][1].startswith("cuda") and len(set(devices)) == len(devices):
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def threads_per_rank(world_size: int) -> int:
    """CPU cores of this process, shared among the ranks on them; 0, torch's choice, where OMP_NUM_THREADS decides."""
    if "OMP_NUM_THREADS" in os.environ:
        return 0
    return max(1, num_cores() // world_size)


def set_threads(count: int) -> None:
    """Give torch's CPU kernels this many threads; 0 keeps torch's choice.

    A rank calls it before it starts threads. In a fork of a process with a pool of threads, the first use makes the
    pool anew, and where two threads come first at once, one of them fails ("Invalid thread pool").
    """
    import torch

    torch.set_num_threads(count or torch.get_num_threads())


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
