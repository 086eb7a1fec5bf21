"""Ranks that are already there: a program under torchrun, or one that has initialised torch.distributed itself."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import group_backend, joined_device
from omni_sp.errors import ConfigError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def inside_distributed_program() -> bool:
    """True where this process is a rank of the user's own job. Does not import torch if nobody has."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return True
    return all(name in os.environ for name in _RENDEZVOUS)


def join(config: DiffusionParallelConfig, device: str | None, timeout_s: float) -> str:
    """Make this process a rank of the job around it, and return its device.

    Where the user has not initialised torch.distributed, this does. The process group then stays until the program
    ends: other parts of the program may use it too.

    Raises:
        ConfigError: the job's size is not the product of the degrees, or there are too few GPUs.
    """
    import torch
    import torch.distributed as dist

    own = joined_device(device, config)
    if not dist.is_initialized():
        size = int(os.environ["WORLD_SIZE"])
        if size != config.world_size:
            raise ConfigError(
                f"{config.equation}, but this program runs on {size}: the product of the degrees must equal the number "
                "of ranks it was started with"
            )
        if own.startswith("cuda"):
            torch.cuda.set_device(own)
        # With a GPU named outright all ranks may share it, and NCCL refuses that.
        backend = "gloo" if device is not None and ":" in device else group_backend([("", own)])
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        atexit.register(_leave)
    return own


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
