"""Several ranks on one NUMA node of a CPU: by itself vLLM gives each a node and nearly all memory, and fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from omni_sp.machine import num_cores

_BIND, _THREADS, _SPACE = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"
_CACHE_SHARE = 0.25  # of the free memory, for the caches of all ranks; weights and activations need the rest
_GIB = 2**30


def set_defaults(world_size: int, *, memory_is_set: bool) -> None:
    """Set the environment variables that several ranks on this CPU need, and print them; those set by the user stay.

    ``memory_is_set``: a flag gives the memory of the cache, so no default does.
    """
    if world_size <= _numa_nodes():
        return
    import psutil  # type: ignore[import-untyped]

    values = defaults(world_size, num_cores(), psutil.virtual_memory().available, os.environ)
    if memory_is_set:
        values.pop(_SPACE, None)
    if values:
        os.environ.update(values)
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        print(
            f"omni-sp: {world_size} ranks share this CPU, so: {shown} (set them yourself to have others)",
            file=sys.stderr,
        )


def defaults(world_size: int, cores: int, free_bytes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that an environment lacks: ranks not bound, cores shared evenly, GiB of each rank's cache."""
    values = {
        _BIND: "nobind",
        _THREADS: str(max(1, cores // world_size)),
        _SPACE: str(max(1, int(_CACHE_SHARE * free_bytes / world_size / _GIB))),
    }
    return {name: value for name, value in values.items() if name not in environment}


def _numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
