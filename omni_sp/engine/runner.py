"""One rank's pipeline, loaded and parallelized, and one call on it. The same whether the rank is ours or the user's."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.engine.messages import Call, Done, EngineOptions, Ready
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.call import pipeline_facts, run_call
from omni_sp.pipelines.check import stage_errors
from omni_sp.pipelines.load import default_dtype, load_pipeline
from omni_sp.pipelines.parallelize import ParallelHandle, parallelize
from omni_sp.pipelines.timing import OnStep


class Runner:
    """A pipeline in this process, to be spread over a mesh and called.

    Args:
        options: the model and how to load it. device: this rank's own, such as "cuda:1".
    """

    def __init__(self, options: EngineOptions, device: str) -> None:
        began = time.perf_counter()
        self._options = options
        self._device = torch.device(device)
        self._dtype = options.dtype or default_dtype(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._pipe: Any = load_pipeline(options.source, dtype=self._dtype, device=device)
        self._handle: ParallelHandle | None = None
        self._load_s = time.perf_counter() - began

    def spread(self, mesh: ParallelMesh) -> Ready:
        """Parallelize the pipeline. Every rank of the mesh does it; afterwards run() works."""
        began = time.perf_counter()
        facts = pipeline_facts(self._pipe, self._options.source.sampling_defaults)
        self._takes_generator = facts.taken_as("generator") is not None
        self._handle = self._parallelized(mesh)
        self._load_s += time.perf_counter() - began
        return Ready(
            rank=mesh.rank,
            ranks=mesh.world_size,
            layout=mesh.describe(),
            facts=facts,
            device=str(self._device),
            dtype=self._dtype,
            load_s=self._load_s,
        )

    def run(self, call: Call, on_step: OnStep | None = None, *, answers: bool = True) -> Done:
        """Call the pipeline. Every rank runs the same calls in the same order.

        Args:
            answers: False where nobody will look at this rank's pictures: it stops at the latent, which all ranks
                share, and leaves the VAE to the rank that answers. On a CPU they would only take each other's cores.
        """
        assert self._handle is not None, "spread() comes before run()"
        self._handle.forget_tokens()
        arguments = dict(call.arguments)
        if not answers and "output_type" in arguments:
            arguments["output_type"] = "latent"
        with ExitStack() as stack:
            if self._handle.mesh.world_size > 1:
                # A pipeline may also draw from the global generators; ranks must not diverge there.
                devices = [self._device.index] if self._device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=devices))
                torch.manual_seed(call.seed)
            seed = call.seed if self._takes_generator else None
            result = run_call(self._pipe, arguments, seed=seed, device=self._device, on_step=on_step)
        return Done(request_id=call.request_id, result=result, tokens=dict(self._handle.tokens))

    def check(self, call: Call) -> Done:
        """Run a call on this rank alone and over all ranks, and tell how far apart they are. All ranks do it."""
        assert self._handle is not None, "spread() comes before check()"
        mesh = self._handle.mesh

        def spread() -> None:
            torch.manual_seed(call.seed)
            self._handle = self._parallelized(mesh)

        def alone() -> None:
            torch.manual_seed(call.seed)
            assert self._handle is not None
            self._handle.remove()

        seed = call.seed if self._takes_generator else None
        with torch.random.fork_rng(devices=[self._device.index] if self._device.type == "cuda" else []):
            errors = stage_errors(
                self._pipe, call.arguments, seed=seed, device=self._device, alone=alone, spread=spread
            )
        return Done(request_id=call.request_id, result=None, tokens=dict(self._handle.tokens), errors=errors)

    def _parallelized(self, mesh: ParallelMesh) -> ParallelHandle:
        return parallelize(
            self._pipe,
            mesh,
            attention_backend=self._options.attention_backend,
            attention_strategy=self._options.attention_strategy,
        )

    def close(self) -> None:
        """Give the pipeline's memory back."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._pipe = None, None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
