"""Several ranks on one NUMA node of a CPU: vLLM gives each a node and nearly all memory, and so refuses to start."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_BIND, _THREADS, _SPACE = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"
_SHARE = 0.25  # of the memory that is free, for the caches of all ranks; weights and activations want theirs
_GIB = 2**30


def set_defaults(world_size: int, *, memory_is_set: bool) -> None:
    """Set what vLLM needs for so many ranks on this CPU, and say so. What the user has set stays.

    Args:
        world_size: ranks of the engine. memory_is_set: a flag says how much memory the cache may have.
    """
    if world_size <= _numa_nodes():
        return
    import psutil  # type: ignore[import-untyped]

    found = defaults(world_size, _cores(), psutil.virtual_memory().available, os.environ)
    if memory_is_set:
        found.pop(_SPACE, None)
    if found:
        os.environ.update(found)
        words = " ".join(f"{name}={value}" for name, value in found.items())
        print(
            f"omni-sp: {world_size} ranks share this CPU, so: {words} (set them yourself to have others)",
            file=sys.stderr,
        )


def defaults(world_size: int, cores: int, free_bytes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be set beside what an environment has: ranks not bound, cores shared out, GiB of a rank's cache."""
    wanted = {
        _BIND: "nobind",
        _THREADS: str(max(1, cores // world_size)),
        _SPACE: str(max(1, int(_SHARE * free_bytes / world_size / _GIB))),
    }
    return {name: value for name, value in wanted.items() if name not in environment}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
