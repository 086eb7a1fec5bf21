"""Rank processes that are started once and then run one function after the other, each on a mesh of its own degrees.

Importing torch and diffusers takes seconds: tests that each started their own processes would take minutes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from omni_sp import DiffusionParallelConfig
from omni_sp.engine.worker import die_with_parent
from omni_sp.mesh import ParallelMesh

# The ranks are forked from a process that has imported these, and share its memory. Only what is the same whatever the
# import path is: that process does not have the one of its parent before Python 3.13.
_PRELOADED = (
    "torch._dynamo",
    "transformers",
    "peft",
    "diffusers.models.transformers",
    "diffusers.guiders",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",  # the demo model's
)


def fork_context() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forks of one that has imported torch, transformers and diffusers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


class RankError(AssertionError):
    """A rank raised or died; the message has its traceback."""


class RankPool:
    """Ranks on CPUs, connected by gloo; needs Linux or macOS.

    A rank imports the module of the function that it runs, by the import path of the process that made the pool. Every
    run takes the first ranks of one job, so that process groups are made once for all runs of the same degrees.

    Args:
        num_ranks: the most ranks of a run.
    """

    def __init__(self, num_ranks: int = 4) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        context = fork_context()
        for rank in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, self._store.port, there), daemon=True)
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
        cfg: int = 1,
        shared_memory: bool = True,
        vae_parallel: Any = "auto",
        text_encoder_parallel: Any = "auto",
        shard_weights: bool = False,
        timeout: float = 120.0,
    ) -> list[Any]:
        """Call ``function(mesh, *args)`` on each of cfg × ulysses × ring ranks, with torch's seed at 0.

        Args:
            function: a function at the top level of a module; its first argument is the rank's ParallelMesh.
            *args: further arguments, the same for all ranks.
            ulysses: the Ulysses degree.
            ring: the ring degree.
            cfg: the groups that share branches of guidance.
            shared_memory: let tensors cross between ranks through shared memory; else they go through gloo.
            vae_parallel: whether all ranks decode together.
            text_encoder_parallel: whether each encoder runs on one rank.
            shard_weights: whether each rank keeps its part of the weights.
            timeout: seconds to wait for an answer.

        Returns:
            What each rank returned, in order.

        Raises:
            RankError: a rank raised, died, or did not answer in time; the processes are ended.
        """
        config = DiffusionParallelConfig(
            ulysses_degree=ulysses,
            ring_degree=ring,
            cfg_parallel_size=cfg,
            vae_parallel=vae_parallel,
            text_encoder_parallel=text_encoder_parallel,
            shard_weights=shard_weights,
        )
        job = pickle.dumps((config, shared_memory, function, args))
        pipes = self._pipes[: config.world_size]
        assert len(pipes) == config.world_size, f"{config.equation}, but the pool has {len(self._pipes)}"
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
            message = "\n".join(f"rank {rank} of {config.world_size}:\n{text}" for rank, text in failures.items())
            raise RankError(message or f"ranks {sorted(waiting.values())} did not answer in {timeout} s")
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


def _serve(rank: int, num_ranks: int, port: int, pipe: Connection) -> None:
    """Run what the pool asks for until its pipe closes. ``multiprocessing`` has set the parent's import path."""
    die_with_parent(os.getppid())  # a test run that is killed must not leave its ranks
    torch.set_num_threads(1)
    # What was imported stays. To look through it for garbage takes a third of a second, and copies shared memory.
    gc.freeze()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    if num_ranks > 1:
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    meshes: dict[tuple[DiffusionParallelConfig, bool], ParallelMesh] = {}
    warnings.simplefilter("error")
    while True:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            config, shared_memory, function, args = pickle.loads(job)
            if (config, shared_memory) not in meshes:
                ranks = None if config.world_size == num_ranks else range(config.world_size)
                meshes[config, shared_memory] = ParallelMesh(config, ranks=ranks, shared_memory=shared_memory)
            # Whatever ran before, the ranks draw the same numbers, which jobs without seeds of their own rely on.
            torch.manual_seed(0)
            answer = (True, function(meshes[config, shared_memory], *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
