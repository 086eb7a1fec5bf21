"""The launchers by the names that users give: on this machine, in a torchrun job, on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omni_sp.config import LAUNCHERS
from omni_sp.engine.messages import EngineOptions
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.fork import local_launcher
from omni_sp.engine.ranks.ray import RayLauncher, require_ray
from omni_sp.engine.ranks.torchrun import inside_distributed_program, job_around, job_rank
from omni_sp.engine.ranks.torchrun_supervised import require_supervised_job_of, torchrun_launchers
from omni_sp.errors import ConfigError
from omni_sp.validation import shown, suggestion

_, TORCHRUN, RAY = LAUNCHERS


def check_launcher(launcher: Any, nodes: int | None, parallel_config: Any) -> None:
    """Refuse a launcher that cannot start ranks here.

    Args:
        launcher: one of LAUNCHERS; None where the surroundings decide.
        nodes: of the Ray cluster.
        parallel_config: as the user gave it.

    Raises:
        ConfigError: an unknown name; a torchrun job around a program that is to start ranks by itself, or none around
            one that is to join it; Ray is not installed; or what Ray alone, or it alone not, can do.
    """
    if launcher is not None and launcher not in LAUNCHERS:
        raise ConfigError(f"launcher={shown(launcher)}; {suggestion(str(launcher), LAUNCHERS)}")
    if nodes is not None and launcher != RAY:
        raise ConfigError(f'nodes={shown(nodes)} is for launcher="ray"; torchrun has --nnodes')
    if launcher is None:
        return
    joined = inside_distributed_program()
    if launcher == TORCHRUN and not joined:
        raise ConfigError(
            'launcher="torchrun", and this process is none of a torchrun job: start the program with '
            "`torchrun --nproc-per-node N PROGRAM`"
        )
    if launcher != TORCHRUN and joined:
        raise ConfigError(
            f'launcher="{launcher}", and each process of the job around would start ranks of its own ({job_around()}): '
            "leave launcher out, to join the job"
        )
    if launcher == RAY:
        require_ray()
        if isinstance(parallel_config, str):
            raise ConfigError(
                f'parallel_config={shown(parallel_config)} looks at the devices of this machine, and launcher="ray" '
                "has those of a cluster: give the degrees, such as those that `omni-sp plan` prefers"
            )


def launchers_for(
    options: EngineOptions, launcher: Launcher | str | None, nodes: int | None
) -> tuple[Sequence[Launcher], bool]:
    """What starts the ranks of each replica, and whether this process is the one that has them started.

    Args:
        options: of each engine.
        launcher: one of LAUNCHERS; None where the surroundings decide; or a launcher itself.
        nodes: of the Ray cluster.

    Raises:
        ConfigError: a torchrun job of another size; several replicas, and a launcher of one.
    """
    if launcher is not None and not isinstance(launcher, str):
        if options.config.data_parallel_size > 1:
            raise ConfigError("launcher starts the ranks of one engine: leave it out, or data_parallel_size")
        return [launcher], True
    if launcher == RAY:
        return ray_launchers(options, nodes), True
    if inside_distributed_program():
        require_supervised_job_of(options.config)
        if job_rank() == 0:
            return torchrun_launchers(options.config), True
        return local_launchers(options), False  # which are never used
    return local_launchers(options), True


def ray_launchers(options: EngineOptions, nodes: int | None) -> list[Launcher]:
    """What starts the ranks of each replica on a Ray cluster."""
    return [RayLauncher(nodes) for _ in range(options.config.data_parallel_size)]


def local_launchers(options: EngineOptions) -> list[Launcher]:
    """What starts the ranks of each replica on this machine."""
    replicas = range(options.config.data_parallel_size)
    return [local_launcher(options.source, thread_stays=True, replica=replica) for replica in replicas]


def for_other_machines(options: EngineOptions) -> EngineOptions:
    """The options with paths that mean the same from any folder."""
    source = options.source
    return replace(
        options,
        source=replace(
            source,
            location=_absolute(source.location),
            single_file_config=source.single_file_config and _absolute(source.single_file_config),
        ),
        lora=_absolute_all(options.lora),
    )


def _absolute_all(paths: Mapping[str, str]) -> dict[str, str]:
    return {name: _absolute(path) for name, path in paths.items()}


def _absolute(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path
