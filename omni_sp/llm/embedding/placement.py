"""Which devices each replica has, and the command and environment that it is started with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from omni_sp.command_line import CommandLine
from omni_sp.errors import ConfigError
from omni_sp.llm.embedding.settings import EmbeddingSettings
from omni_sp.llm.vllm import cpu_env
from omni_sp.machine import num_cores

_MEMORY_SHARE = 0.9
_MOST_RENDERERS = 4
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LISTING_S = 20.0


class Placement(NamedTuple):
    """Where and how one replica runs.

    Attributes:
        devices: its GPUs, as CUDA_VISIBLE_DEVICES names them; empty on the CPU.
        arguments: of ``vllm serve``, without its socket.
        environment: variables beside those of the server.
    """

    devices: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: dict[str, str]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or all that the driver lists; empty without a driver."""
    if _VISIBLE in environment:
        return [name.strip() for name in environment[_VISIBLE].split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_LISTING_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(index) for index in range(count)]


def placements(
    settings: EmbeddingSettings, gpus: list[str], environment: Mapping[str, str], free_bytes: int
) -> list[Placement]:
    """One placement for each replica.

    Args:
        settings: how many replicas, and their arguments.
        gpus: those that are visible.
        environment: variables of the server: what is set there stays.
        free_bytes: free memory of the machine, which replicas on the CPU share.

    Raises:
        ConfigError: there are not so many GPUs, or they cannot be shared out evenly.
    """
    num_gpus = len(gpus) if settings.gpus is None else settings.gpus
    if num_gpus > len(gpus):
        raise ConfigError(f"--gpus {num_gpus}: {len(gpus)} are visible here; {_VISIBLE} and nvidia-smi -L list them")
    if num_gpus % settings.ranks and num_gpus:
        raise ConfigError(
            f"{num_gpus} GPUs cannot be shared by replicas of {settings.ranks} each (--tensor-parallel-size): give "
            f"--gpus as a multiple of {settings.ranks}"
        )
    threads = max(1, min(_MOST_RENDERERS, num_cores() // settings.replicas))
    if not num_gpus:
        variables = {}
        if settings.replicas > 1:
            variables = cpu_env.defaults(settings.replicas * settings.ranks, num_cores(), free_bytes, environment)
        own = Placement((), _arguments(settings, threads, None), variables)
        return [own] * settings.replicas
    groups = [tuple(gpus[first : first + settings.ranks]) for first in range(0, num_gpus, settings.ranks)]
    found = []
    for number in range(settings.replicas):
        sharers = len(range(number % len(groups), settings.replicas, len(groups)))
        devices = groups[number % len(groups)]
        share = int(1000 * _MEMORY_SHARE / sharers) / 1000 if sharers > 1 else None
        found.append(Placement(devices, _arguments(settings, threads, share), {_VISIBLE: ",".join(devices)}))
    return found


def command(settings: EmbeddingSettings, placement: Placement, path: str) -> list[str]:
    """The command of a replica that listens on the Unix socket at ``path``."""
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", settings.model]
    return [*vllm, "--runner", "pooling", "--uds", path, *placement.arguments]


def _arguments(settings: EmbeddingSettings, threads: int, memory: float | None) -> tuple[str, ...]:
    given = CommandLine(settings.vllm_arguments).flags()
    ours = []
    if "--renderer-num-workers" not in given:
        ours += ["--renderer-num-workers", str(threads)]
    if memory is not None and not {"--gpu-memory-utilization", "--kv-cache-memory-bytes"} & set(given):
        ours += ["--gpu-memory-utilization", f"{memory:g}"]
    if "--disable-uvicorn-access-log" not in given:
        ours.append("--disable-uvicorn-access-log")  # each request has its line in the front's log
    return (*settings.vllm_arguments, *ours)
