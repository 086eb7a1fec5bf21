"""Ranks that are already there: a program under torchrun, or one that has initialised torch.distributed itself."""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
from datetime import timedelta
from typing import Any

from omni_sp.config import DiffusionParallelConfig
from omni_sp.engine.devices import group_backend, joined_device
from omni_sp.errors import ConfigError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = f"if there is no such job, `unset {' '.join(_RENDEZVOUS)}`"
_NOTICE_S = 2.0
_PEERS_S = 50.0
"""How long processes that torchrun did not start may take to find each other: there may be none."""
_GRACE_S = 3.0  # torch notices a little late that its time is over


def inside_distributed_program() -> bool:
    """True where this process is one of several ranks of the user's own job. Does not import torch if nobody has.

    A job of one process is none: launchers and clusters set WORLD_SIZE=1 for programs that know nothing of it.

    Raises:
        ConfigError: the variables that say so cannot be.
    """
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size() > 1
    return all(name in os.environ for name in _RENDEZVOUS) and job_size() > 1


def job_rank() -> int:
    """This process's rank in the job that its environment tells of."""
    return _job()[0]


def job_size() -> int:
    """How many processes that job has."""
    return _job()[1]


def job_around() -> str:
    """The variables of that job, and what to do where there is none, for people."""
    return f"{_described()}; {_WAY_OUT}"


def require_job_of(config: DiffusionParallelConfig) -> None:
    """Refuse a job of another size, on each of its processes alike, before anything waits.

    Raises:
        ConfigError: the job has another number of processes than the degrees need.
    """
    size = job_size()
    if size == config.num_processes:
        return
    if _is_torchrun():
        raise ConfigError(
            f"{config.full_equation}, but torchrun started {size} processes: the product of the degrees must be "
            "their number"
        )
    raise ConfigError(
        f"{config.full_equation}, but {_described()} in the environment say that this is one process of a job of "
        f"{size}: give degrees whose product is {size}; {_WAY_OUT}"
    )


def rendezvous(timeout_s: float) -> Any:
    """The store at which the job's processes meet, once all are there.

    Raises:
        ConfigError: some are not there in time, or cannot be.
    """
    seconds = timeout_s if _is_torchrun() else min(timeout_s, _PEERS_S)
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # In a thread: for a program that takes the connection and never answers, torch waits without bound.
    threading.Thread(target=_meet, args=(seconds, found), daemon=True).start()
    try:
        try:
            result = found.get(timeout=_NOTICE_S)
        except queue.Empty:
            waiting = f"waiting up to {seconds:g} s for the other processes of the job of {job_around()}"
            print(f"omni-sp: {waiting}", file=sys.stderr, flush=True)
            result = found.get(timeout=seconds + _GRACE_S)
    except queue.Empty:
        result = TimeoutError("what listens there gives no answer")
    if not isinstance(result, Exception):
        return result
    reason = (str(result).splitlines() or [type(result).__name__])[0]
    raise ConfigError(
        f"the other processes of the job of {_described()} were not found in {seconds:g} s ({reason}): start them all, "
        f"with a free MASTER_PORT on rank 0's machine; {_WAY_OUT}"
    ) from result


def _meet(seconds: float, found: queue.SimpleQueue[Any]) -> None:
    import torch.distributed as dist

    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))  # type: ignore[attr-defined]
        found.put(store)
    except Exception as error:
        found.put(error)


def _described() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in _RENDEZVOUS if name in os.environ)


def join(config: DiffusionParallelConfig, device: str | None, timeout_s: float) -> str:
    """Make this process a rank of the job around it, and return its device.

    Where the user has not initialised torch.distributed, this does. The process group then stays until the program
    ends: other parts of the program may use it too.

    Raises:
        ConfigError: the job's size is not the product of the degrees, its processes are not found, or there are too few
            GPUs.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        require_job_of(config)
    own = joined_device(device, config)
    if not dist.is_initialized():
        if own.startswith("cuda"):
            torch.cuda.set_device(own)
        # With a GPU named outright all ranks may share it, and NCCL refuses that.
        backend = "gloo" if device is not None and ":" in device else group_backend([("", own)])
        timeout = timedelta(seconds=timeout_s)
        store = rendezvous(timeout_s)
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),  # type: ignore[attr-defined]
            rank=job_rank(),
            world_size=job_size(),
            timeout=timeout,
        )
        atexit.register(_leave)
    return own


def _job() -> tuple[int, int]:
    try:
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        rank, size = -1, 0
    # A job of one is none, whatever the rest says.
    if size != 1 and not 0 <= rank < size:
        raise ConfigError(f"{_described()} in the environment is no rank of a job: set them right; {_WAY_OUT}")
    return rank, size


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
