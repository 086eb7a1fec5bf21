"""One rank's pipeline, loaded and parallelized, and one call on it, whoever started the rank."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from omni_sp.collectives import gather_ints
from omni_sp.engine.batching import BATCH, ROUNDING, SMALLEST, call_for, merge_calls
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Progress, Ready
from omni_sp.errors import OmniSPError, RequestAbortedError, UnsupportedModelError
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.adapters import LoraAdapters
from omni_sp.pipelines.capabilities import inspect_pipeline
from omni_sp.pipelines.check import difference, stage_errors
from omni_sp.pipelines.load import OnComponent, default_dtype, load_pipeline
from omni_sp.pipelines.metadata import model_name
from omni_sp.pipelines.parallelize import ParallelHandle, parallelize, transformers_of
from omni_sp.pipelines.preview import Previews
from omni_sp.pipelines.quirks import NO_LATENT_OUTPUT
from omni_sp.pipelines.run import run_call
from omni_sp.pipelines.schedulers import scheduler_replaced
from omni_sp.pipelines.sharded_loading import read_share
from omni_sp.pipelines.shared_encoders import runs_encoder

_MAX_PREVIEWS = 8  # previews of one call, at most
_GENERATORS = threading.RLock()
"""Torch's global generators are those of all threads: two calls at a time would draw each other's numbers."""


class PipelineRunner:
    """A pipeline in this process, to be parallelized over a mesh and called.

    Args:
        rank: this process's in the mesh.
        decodes: False where nobody looks at what this process decodes (see load_pipeline).
        on_component: called before each component is read (see load_pipeline).
    """

    def __init__(
        self,
        options: EngineOptions,
        device: str,
        *,
        rank: int = 0,
        decodes: bool = True,
        on_component: OnComponent = lambda part, done, total: None,
    ) -> None:
        began = time.perf_counter()
        self._options = options
        self._device = torch.device(device)
        self._dtype = options.dtype or default_dtype(device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._pipe: Any = load_pipeline(
            options.source,
            dtype=self._dtype,
            device=device,
            decodes=decodes,
            shares_weights=options.config.shard_weights and options.config.world_size > 1,
            quantization=options.quantization,
            offload=options.offload,
            vae_dtype=options.vae_dtype,
            encodes=functools.partial(runs_encoder, options.config, rank),
            on_component=on_component,
        )
        self._handle: ParallelHandle | None = None
        self._load_s = time.perf_counter() - began

    def parallelize(self, mesh: ParallelMesh) -> Ready:
        """Parallelize the pipeline. Every rank of the mesh does it; afterwards run() works."""
        began = time.perf_counter()
        capabilities = inspect_pipeline(self._pipe, self._options.source.sampling_defaults)
        self._takes_generator = capabilities.argument_name("generator") is not None
        self._several_as = capabilities.argument_name("num_outputs_per_prompt") or ""
        capabilities = replace(capabilities, adapters=tuple(self._options.lora))
        for _, model in transformers_of(self._pipe):
            read_share(model)
        self._handle = self._parallelized(mesh)
        # After it: adapters are put beside weights, which a rank may have only a part of.
        self._adapters = LoraAdapters(self._pipe, self._options.lora, mesh)
        self._handle.vaes.read_weights()
        self._load_s += time.perf_counter() - began
        return Ready(
            rank=mesh.rank,
            ranks=mesh.world_size,
            layout=mesh.describe(),
            rings=mesh.rings,
            capabilities=capabilities,
            device=str(self._device),
            dtype=self._dtype,
            load_s=self._load_s,
            model=model_name(self._options.source.name),
        )

    def run(
        self,
        call: Call,
        on_progress: OnProgress | None = None,
        *,
        answers: bool = True,
        is_aborted: Callable[[], bool] = lambda: False,
        latents: bool = False,
    ) -> Done:
        """Call the pipeline. Every rank runs the same calls in the same order.

        Args:
            answers: False where nobody will look at this rank's pictures: it stops at the latent, which all ranks
                share, and leaves the VAE to the rank that answers, unless the VAE is shared too. On a CPU they would
                only take each other's cores.
            is_aborted: whether this rank heard that the call is to be left; if any rank has, all leave it before the
                same step.
            latents: every rank stops at the latent.
        """
        assert self._handle is not None, "parallelize() comes before run()"
        self._handle.reset_counts()
        self._adapters.apply(call.adapters)
        mesh = self._handle.mesh
        arguments, vaes = dict(call.arguments), self._handle.vaes
        is_shared = vaes.are_expected(arguments)
        stops = latents or not (answers or is_shared)
        if stops and "output_type" in arguments and type(self._pipe).__name__ not in NO_LATENT_OUTPUT:
            arguments["output_type"] = "latent"
        with ExitStack() as stack:
            if not is_shared:
                stack.enter_context(vaes.alone())  # other ranks may stop before it
            stack.enter_context(scheduler_replaced(self._pipe, call.scheduler))
            stack.enter_context(self._seeded(call))
            states = self._generator_states()
            # Of a batch there is a seed for each prompt; otherwise one for all outputs, or for each.
            previews, num_outputs = None, max(len(call.seeds), arguments.get(self._several_as) or 1)
            if call.previews and on_progress is not None:
                previews = Previews(self._pipe, arguments.get("height"), arguments.get("width"))

            steps = (0, 0)

            def on_compile(text: str) -> None:
                if on_progress is not None:
                    on_progress(Progress(done=steps[0], total=steps[1], note=text))

            def on_step(done: int, total: int) -> None:
                nonlocal steps
                steps = (done, total)
                if on_progress is not None:
                    shows = previews is not None and 0 < done < total and _is_preview_step(done, total)
                    with vaes.alone():  # other ranks make none
                        pictures = previews.images(num_outputs) if previews is not None and shows else ()
                    on_progress(Progress(done=done, total=total, previews=pictures))
                if call.can_be_aborted and done < total and any_rank(is_aborted(), mesh):
                    raise RequestAbortedError(f"{call.request_id} was aborted after {done} of {total} steps")

            self._handle.on_compile(on_compile)
            try:
                result = run_call(
                    self._pipe,
                    arguments,
                    seed=self._seed(call),
                    device=self._device,
                    on_step=on_step,
                    on_latent=None if previews is None else previews.keep,
                )
            except BaseException:
                self._handle.drop()
                # What a pipeline does at its end: offloaded parts go back, step caches forget.
                getattr(self._pipe, "maybe_free_model_hooks", lambda: None)()
                raise
            if len(call.seeds) > 1 and any_rank(states != self._generator_states(), mesh):
                raise UnsupportedModelError(
                    f"{type(self._pipe).__name__} drew random numbers from torch's global generator, which is one for "
                    "all prompts of a call: each seed needs a call of its own"
                )
        return Done(
            request_id=call.request_id,
            result=result,
            tokens=dict(self._handle.tokens),
            blocks=self._handle.blocks.as_dict(),
            kernels={str(shape): name for shape, name in self._handle.tuned_kernels.items()},
            vae_ranks=vaes.num_ranks,
            encoder_ranks={name: tuple(sorted(ranks)) for name, ranks in self._handle.encoders.ranks.items()},
            branches={} if (branches := self._handle.branches) is None else branches.counts.as_dict(mesh.cfg.size),
        )

    def check(self, call: Call) -> Done:
        """Run a call in two ways, as its ``check`` says, and answer how far apart they are. All ranks do it."""
        self._adapters.apply(call.adapters)
        with scheduler_replaced(self._pipe, call.scheduler):
            return self._check_batch(call) if call.check == "batch" else self._check_ranks(call)

    def _check_ranks(self, call: Call) -> Done:
        """On this rank alone, and over all ranks."""
        assert self._handle is not None, "parallelize() comes before check()"
        mesh = self._handle.mesh

        def on_all_ranks() -> None:
            torch.manual_seed(call.seeds[0])
            self._handle = self._parallelized(mesh)

        def on_one_rank() -> None:
            torch.manual_seed(call.seeds[0])
            assert self._handle is not None
            self._handle.remove()

        with self._seeded(call):
            errors = stage_errors(
                self._pipe,
                call.arguments,
                seed=self._seed(call),
                device=self._device,
                on_one_rank=on_one_rank,
                on_all_ranks=on_all_ranks,
            )
        return Done(
            request_id=call.request_id,
            result=None,
            tokens=self._handle.tokens,
            errors=errors,
            gathers=self._handle.gathers,
            blocks=self._handle.blocks.as_dict(),
        )

    def _check_batch(self, call: Call) -> Done:
        """Each prompt alone, all in a batch, and each in a batch of its own kind, for what a batch itself rounds away.

        Raises:
            UnsupportedModelError: the pipeline fails on a batch.
        """
        count = len(call.seeds)
        singles = [call_for(call, index) for index in range(count)]
        try:
            on_one_rank = [self._outcome(single, 1) for single in singles]
            mixed = self._outcome(call, count)
            twins = [self._outcome(merge_calls(call.request_id, [single] * count), count) for single in singles]
        except OmniSPError:
            raise
        except Exception as error:
            # Without the text, which may differ between ranks: they fail alike, and go on.
            name = type(error).__name__
            raise UnsupportedModelError(f"{type(self._pipe).__name__} raises {name} on a batch") from error
        errors = {
            BATCH: max(difference(mine[0], theirs) for mine, theirs in zip(on_one_rank, mixed, strict=True)),
            ROUNDING: max(
                difference(mine[0], twin) for mine, pair in zip(on_one_rank, twins, strict=True) for twin in pair
            ),
            SMALLEST: max(1e-5, 8 * torch.finfo(getattr(torch, self._dtype)).eps),
        }
        return Done(request_id=call.request_id, result=None, tokens={}, errors=errors)

    def _outcome(self, call: Call, count: int) -> list[torch.Tensor]:
        """The latents of so many prompts; decoded where the pipeline gives no latents."""
        done = self.run(replace(call, previews=False), latents=True)
        assert done.result is not None
        rows = [torch.as_tensor(row).float() for row in (*done.result.images, *done.result.videos)]
        rows = rows or [torch.as_tensor(row).float() for row in done.result.audios]
        if len(rows) != count:
            raise ValueError(f"{len(rows)} results for {count} prompts")
        return rows

    def _seed(self, call: Call) -> int | tuple[int, ...] | None:
        """As run_call() takes it."""
        if not self._takes_generator:
            return None
        return call.seeds[0] if len(call.seeds) == 1 else call.seeds

    def _parallelized(self, mesh: ParallelMesh) -> ParallelHandle:
        return parallelize(
            self._pipe,
            mesh,
            attention_backend=self._options.attention_backend,
            attention_strategy=self._options.attention_strategy,
            replay=self._options.replay,
            compile=self._options.compile,
            cuda_graphs=self._options.cuda_graphs,
        )

    @contextmanager
    def _seeded(self, call: Call) -> Iterator[None]:
        """The global generators from a call's first seed on, and afterwards as they were.

        A pipeline or its scheduler may draw from them: the seed speaks there too.
        """
        assert self._handle is not None
        with ExitStack() as stack:
            # Ranks that wait for each other must not also wait for other threads, of which each has its own order.
            if self._handle.mesh.world_size == 1:
                stack.enter_context(_GENERATORS)
            stack.enter_context(torch.random.fork_rng(devices=self._generator_devices))
            torch.manual_seed(call.seeds[0])
            yield

    @property
    def _generator_devices(self) -> list[int]:
        """The GPUs whose global generator a call may draw from; the CPU's it always may."""
        return [self._device.index] if self._device.type == "cuda" else []

    def _generator_states(self) -> list[bytes]:
        """What tells whether random numbers were drawn from the global generators. It costs no synchronisation."""
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._generator_devices)]
        return [state.numpy().tobytes() for state in states]

    def close(self) -> None:
        """Give the pipeline's memory back."""
        # Sharded weights would be restored by all ranks together, and this one may be the last.
        if self._handle is not None and self._handle.mesh.weights.size == 1:
            self._handle.remove()
        self._handle, self._pipe = None, None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def any_rank(flag: bool, mesh: ParallelMesh) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer. A collective call."""
    return any(value for (value,) in gather_ints([int(flag)], mesh.world))


def _is_preview_step(done: int, total: int) -> bool:
    """True a few times along the way."""
    return total <= _MAX_PREVIEWS or done * _MAX_PREVIEWS // total != (done - 1) * _MAX_PREVIEWS // total
