"""Persistent rank processes for tests: started once per session, told by pipe which function to run on which mesh.

Importing torch costs seconds; a test that started its own processes would take minutes in sum.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from omni_sp import DiffusionParallelConfig
from omni_sp.engine.worker import die_with_parent
from omni_sp.mesh import ParallelMesh

ROOT = Path(__file__).resolve().parent.parent
MAX_RANKS = 4


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class RankPool:
    """Up to four ranks on gloo. ``run`` is the only way in; every wait is bounded."""

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._generation = 0
        self._world_size = 0
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(MAX_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ulysses: int = 1,
        ring: int = 1,
        shared_memory: bool = True,
        timeout: float = 120.0,
    ) -> list[Any]:
        """``function(mesh, *args)`` on ulysses × ring ranks; returns what each rank returned.

        The function is a module-level one. Without ``shared_memory`` all goes through gloo. Raises RankError with the
        failing ranks' tracebacks.
        """
        config = DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
        if config.world_size != self._world_size:
            # A rank that sat out a smaller job still has the group before it: a number tells the groups apart.
            self._generation, self._world_size = self._generation + 1, config.world_size
        job = pickle.dumps((self._generation, config, shared_memory, function, args))
        pipes = self._pipes[: config.world_size]
        for pipe in pipes:
            pipe.send_bytes(job)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(pipes, range(config.world_size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                break
            for pipe in (pipe for pipe in pipes if pipe in ready):
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(5)
                    ok, value = False, f"the process died, exit code {self._processes[rank].exitcode}"
                if ok:
                    results[rank] = value
                    continue
                failures[rank] = value
                # The others may wait for this rank in an exchange; a moment's patience shows who failed first.
                timeout = 2.0
        if failures or waiting:
            self.close()
            told = "\n".join(f"rank {rank} of {config.world_size}:\n{text}" for rank, text in failures.items())
            raise RankError(told or f"ranks {sorted(waiting.values())} did not answer in {timeout} s")
        return [results[rank] for rank in range(config.world_size)]

    @property
    def alive(self) -> bool:
        """False once a failure has ended the processes."""
        return bool(self._processes)

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, port: int, pipe: Connection) -> None:
    """A rank's life: wait for a job, run it, answer."""
    sys.path.insert(0, str(ROOT))
    die_with_parent(os.getppid())  # a test run that is killed must not leave its ranks
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    meshes: dict[tuple[DiffusionParallelConfig, bool], ParallelMesh] = {}
    generation = 0
    warnings.simplefilter("error")
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            wanted, config, shared_memory, function, args = pickle.loads(job)
            if wanted != generation:
                _join(rank, config.world_size, PrefixStore(str(wanted), store))
                meshes.clear()
                generation = wanted
            if (config, shared_memory) not in meshes:
                meshes[config, shared_memory] = ParallelMesh(config, shared_memory=shared_memory)
            answer = (True, function(meshes[config, shared_memory], *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _join(rank: int, world_size: int, store: Store) -> None:
    """Leave the group before, if any, and join a new one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if world_size > 1:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
