"""AsyncOmni: many requests at once from an asyncio program, with a queue, progress, aborts and restarts of ranks."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.batching import Batching
from omni_sp.engine.dispatcher import Dispatcher
from omni_sp.engine.jobs import EngineStats, Job, ReplicaStats
from omni_sp.engine.launchers import RAY, check_launcher, for_other_machines, launchers_for
from omni_sp.engine.messages import Call, Done, Progress, Ready, new_seed
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.torchrun import job_rank
from omni_sp.engine.ranks.torchrun_supervised import supervise_rank
from omni_sp.engine.replica import STARTING
from omni_sp.engine.startup import warm_up_errors_named
from omni_sp.errors import ConfigError, EngineClosedError, OmniSPError, SamplingParamsError
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress, RequestQueued
from omni_sp.pipelines.arguments import call_arguments, warm_up_arguments
from omni_sp.requests import (
    Model,
    NotCopied,
    PromptInput,
    engine_options,
    output_of,
    parse_prompt,
    require_known,
    require_params,
    require_place,
    with_degrees,
)
from omni_sp.validation import require_int, require_number

if TYPE_CHECKING:
    from typing_extensions import Never  # typing has it from Python 3.11 on

__all__ = ["AsyncOmni", "EngineStats", "ReplicaStats"]

_DRAIN_S = 30.0
_POLL_S = 0.05


class AsyncOmni(NotCopied):
    """A diffusers pipeline on rank processes, for many requests at once, drawn one by one or a few together.

    ``async with AsyncOmni(model, ...) as omni`` starts and ends it; ``start()`` and ``close()`` do so by hand. When a
    rank dies (also while nothing runs), raises by itself or falls silent, all ranks are ended and started again;
    requests in the queue stay there. A request whose ranks died during it is tried once more; one whose ranks raised
    fails with that error.

    Under torchrun, on one machine or several, requests are made in the process of rank 0, where ``is_main`` is True. In
    each of the others the program calls ``await omni.supervise_rank()`` instead of starting it: that runs the process's
    rank, which can die and be started again there, and returns when rank 0's AsyncOmni is over.

    Args:
        model: a hub id, a folder that a diffusers pipeline was saved to, a .safetensors or .gguf file (its path, or
            OWNER/REPOSITORY/FILE on the hub), or "omni-sp/shapes", the embedded demo model.
        parallel_config: the degrees; None for one rank, which is a process of its own too; "auto" to let the planner
            choose them, as for Omni, and "auto:4" for 4 ranks. ``on_news`` is called with what was chosen, and why.
            With ``data_parallel_size`` above 1 there are as many engines behind the queue, each with its own ranks
            (under torchrun the job has a process for each of them); the one that is free draws the next request, and
            where one fails, the others go on.
        device: "cpu"; "cuda" for one GPU per rank; "cuda:N" to let all ranks share that GPU; None for "cuda" where
            there is a GPU, else "cpu".
        dtype: "float32", "bfloat16", "float16" or the torch dtype; None for bfloat16 on CUDA and float32 on the CPU.
        single_file_config: of a model that is one file, the folder or hub id of the pipeline that it belongs to, from
            which comes what the file lacks; None where diffusers can tell it by the file.
        attention_backend: name of the attention kernel, "auto", or "tune" to time them for each shape.
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention, for comparing.
        replay: blocks of a transformer are followed once and then replayed, which is the same and quicker.
        compile: what is replayed is compiled by torch.compile, once for each kind of block and each shape; a text is a
            mode of it, such as "max-autotune-no-cudagraphs". The first picture takes minutes, the others are quicker.
        cuda_graphs: on GPUs, forwards whose blocks are all replayed are captured as CUDA graphs, one for each shape.
        quantization: "int8" or "fp8": the weights of transformers' linear layers are kept in 8 bits (by torchao), and
            are in ``dtype`` again where they are used. Needs torchao. Weights that were quantised when they were saved
            (bitsandbytes, torchao, GGUF) are taken as they are, without it.
        offload: what does not run waits on the CPU, by diffusers' own hooks: "model", one part of the pipeline after
            the other is on the device; "group", one layer after the other, which needs least memory and most time.
        vae_dtype: the dtype of the VAE, such as "float32"; None for ``dtype``.
        lora: LoRA adapters by name, each a folder, a file or a hub id, which requests may name: they are read at the
            start, and no weight of the model changes when a request puts them on. Needs peft.
        rank_timeout_s: the longest silence of ranks between two steps, in seconds, before they count as failed.
        startup_timeout_s: the longest silence of ranks while they load the model, in seconds.
        max_queue_length: requests that may wait; None for any number.
        max_batch_size: prompts that may share a call of the pipeline, where they are alike but for prompt, negative
            prompt and seed. Each gets the picture that it gets alone, to rounding: the start draws small pictures both
            ways, and where they differ, requests are drawn one by one (``on_news`` is called with the reason).
        batch_wait_ms: milliseconds that such a request may wait for others when the ranks are free.
        warmup: (height, width) of pictures that are drawn, a step each, before it is ready. Where the pipeline starts
            from pictures, plain grey ones are given to it.
        on_news: called with a few words on what a start is doing.
        launcher: what starts the ranks, as for Omni: "spawn", "torchrun" or "ray", or None to let the surroundings
            decide; or a Launcher of your own.
        nodes: with launcher="ray", how many nodes share the ranks of each engine equally; None for as few as can be.
        unknown: none: any other keyword is an error that names the nearest option.

    Attributes:
        is_main: True where requests can be made; False in the processes of a torchrun job above rank 0.

    Raises:
        ConfigError: an option that cannot be, an unknown one, or a torchrun job of another size.
        ModelNotFoundError: no such model, or no diffusers pipeline.
    """

    def __init__(
        self,
        model: Model,
        parallel_config: DiffusionParallelConfig | str | None = None,
        *,
        device: str | None = None,
        dtype: Any = None,
        single_file_config: Model | None = None,
        attention_backend: str = "auto",
        attention_strategy: str = "omni_sp",
        replay: bool = True,
        compile: bool | str = False,
        cuda_graphs: bool = False,
        quantization: str | None = None,
        offload: str | None = None,
        vae_dtype: Any = None,
        lora: Mapping[str, Model] | None = None,
        rank_timeout_s: float = 600.0,
        startup_timeout_s: float = 3600.0,
        max_queue_length: int | None = None,
        max_batch_size: int = 1,
        batch_wait_ms: float = 0.0,
        warmup: Sequence[tuple[int, int]] = (),
        on_news: Callable[[str], None] | None = None,
        launcher: Launcher | str | None = None,
        nodes: int | None = None,
        **unknown: Never,
    ) -> None:
        require_known(unknown, AsyncOmni)
        if launcher is None or isinstance(launcher, str):
            check_launcher(launcher, nodes, parallel_config)
        self._warmup = tuple(warmup)
        self._observers: list[Callable[[RequestEvent], None]] = []
        options = engine_options(
            model,
            parallel_config,
            device=device,
            dtype=dtype,
            single_file_config=single_file_config,
            attention_backend=attention_backend,
            attention_strategy=attention_strategy,
            replay=replay,
            compile=compile,
            cuda_graphs=cuda_graphs,
            quantization=quantization,
            offload=offload,
            vae_dtype=vae_dtype,
            lora=lora,
            rank_timeout_s=rank_timeout_s,
            startup_timeout_s=startup_timeout_s,
        )
        on_news = on_news or (lambda _news: None)
        self._options = with_degrees(options, parallel_config, on_news, joins=False)
        if launcher == RAY:
            self._options = for_other_machines(self._options)
        launchers, self.is_main = launchers_for(self._options, launcher, nodes)
        self._dispatcher = Dispatcher(
            self._options,
            launchers,
            warm_up=self._warm_up_calls,
            max_queue_length=max_queue_length,
            on_news=on_news,
            batching=_batching(max_batch_size, batch_wait_ms),
        )

    @property
    def status(self) -> str:
        """One of: starting, ready (a replica is), restarting, draining, closed, failed (no ranks would start again)."""
        return self._dispatcher.status

    @property
    def info(self) -> Ready:
        """What is loaded and where: ``capabilities`` of the pipeline, ``layout`` of the ranks, ``device``, ``dtype``.

        Raises:
            EngineClosedError: it has not started yet.
        """
        ready = self._dispatcher.ready
        if ready is None and self._dispatcher.has_begun and self.status == STARTING:
            raise EngineClosedError("the model is still being loaded: try again later")
        if ready is None:
            raise EngineClosedError("AsyncOmni has not started yet: await start(), or use it with `async with`")
        return ready

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        return self._dispatcher.stats

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        """The engines behind the queue, ``data_parallel_size`` of them; copies."""
        return self._dispatcher.replica_stats

    def add_observer(self, observer: Callable[[RequestEvent], None]) -> None:
        """Have every event of every request passed to ``observer``, on the event loop, before it is yielded."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Load the model on the ranks and warm up. The second time, do nothing.

        Raises:
            ConfigError: this process of a torchrun job has no requests to make: it calls supervise_rank().
            InvalidInputError: the ranks refuse the model.
            RankFailedError: a rank failed while starting.
        """
        if not self.is_main:
            raise ConfigError(
                f"rank {job_rank()} of the torchrun job makes no requests: where omni.is_main is False, call `await "
                "omni.supervise_rank()` instead of starting it"
            )
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()

        def on_started(error: BaseException | None) -> None:
            def resolve() -> None:
                if not started.done():
                    started.set_result(None) if error is None else started.set_exception(error)

            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(resolve)

        if self._dispatcher.start(on_started):
            await started

    async def supervise_rank(self) -> None:
        """Run the rank of this process of a torchrun job, until the AsyncOmni of rank 0 is over.

        Raises:
            ConfigError: this process makes requests (``is_main``), or rank 0's was not found in time.
            RankFailedError: rank 0's process, its machine or the network was lost.
        """
        if self.is_main:
            raise ConfigError("supervise_rank() is for the processes of a torchrun job above rank 0: start() this one")
        supervise_rank(self._options.config, self._options.device)

    async def drain(self, timeout_s: float = _DRAIN_S) -> None:
        """Refuse new requests, fail waiting ones, let the running one finish, and close.

        Args:
            timeout_s: seconds that the running request has.
        """
        self._dispatcher.drain()
        until = time.monotonic() + timeout_s
        while not self._dispatcher.is_idle and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        await self.close()

    async def close(self) -> None:
        """End the ranks. Requests that run or wait fail with EngineClosedError. Idempotent."""
        await asyncio.to_thread(self._dispatcher.close)

    async def __aenter__(self) -> AsyncOmni:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        previews: bool = False,
    ) -> AsyncIterator[RequestEvent]:
        """Draw one prompt, and yield its events: RequestQueued, RequestProgress …, then RequestDone or RequestFailed.

        Leaving the iteration early (``aclose()``) aborts the request.

        Args:
            prompt: a string or a dict, as for Omni.generate.
            sampling_params: what is None is the model's own default. The pipeline runs in other processes, so
                ``extra_args`` has no place for its callbacks: the events are in place of them, and ``abort()``.
            request_id: a name of your own for the request; None for a random one.
            priority: higher ones come first, equal ones in the order of arrival.
            previews: yield small pictures of the intermediate result along with some of the steps.

        Raises:
            SamplingParamsError: bad input; nothing was queued.
            QueueFullError: too many requests wait.
            EngineClosedError: it is draining, closed or has failed, or has not started yet.
        """
        params, parsed, capabilities = require_params(sampling_params), parse_prompt(prompt), self.info.capabilities
        _refuse_callbacks(params)
        require_place(request_id, priority)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[RequestEvent | Done] = asyncio.Queue()
        name = request_id or f"request-{uuid.uuid4().hex}"

        def send(event: RequestEvent | Done) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        def on_progress(progress: Progress) -> None:
            previews, done, total = progress.previews, progress.done, progress.total
            first = next(iter(previews), None)
            send(
                RequestProgress(
                    request_id=name, done=done, total=total, preview=first, previews=previews, note=progress.note
                )
            )

        def on_end(result: Done | OmniSPError) -> None:
            send(result if isinstance(result, Done) else RequestFailed(request_id=name, error=result))

        def done(result: Done) -> RequestDone:
            # Here and not in the thread of the ranks: what it warns of is for whoever asked, and may be an error there.
            startup_s = sum(self.stats.start_s.values())
            output = output_of(self.info, job.call, parsed, params, result, startup_s=startup_s)
            return RequestDone(request_id=name, output=output)

        job = Job(
            call=Call(
                request_id=name,
                arguments=call_arguments(capabilities, parsed, params),
                seeds=params.seeds or (new_seed(),),
                scheduler=params.scheduler,
                adapters=params.adapters,
                can_be_aborted=True,
                previews=previews,
            ),
            priority=priority,
            on_position=lambda position: send(RequestQueued(request_id=name, position=position)),
            on_progress=on_progress,
            on_end=on_end,
        )
        self._dispatcher.submit(job)
        try:
            while True:
                received = await events.get()
                event = done(received) if isinstance(received, Done) else received
                for observer in self._observers:
                    observer(event)
                yield event
                if isinstance(event, (RequestDone, RequestFailed)):
                    return
        finally:
            if not job.is_over:
                self._dispatcher.abort(name)

    async def abort(self, request_id: str) -> bool:
        """Stop a request: at once if it waits, at the next step if it runs.

        Args:
            request_id: the request's name.

        Returns:
            False where there is no request of that name.
        """
        return isinstance(request_id, str) and self._dispatcher.abort(request_id)

    def _warm_up_calls(self, ready: Ready) -> list[Call]:
        calls = []
        for height, width in self._warmup:
            name = f"{width} x {height}"
            with warm_up_errors_named(name):
                arguments = warm_up_arguments(ready.capabilities, height, width)
            calls.append(Call(request_id=name, arguments=arguments, seeds=(0,)))
        return calls


def _refuse_callbacks(params: OmniDiffusionSamplingParams) -> None:
    """Refuse functions that a pipeline would call at its steps: it runs in processes that are not the caller's."""
    for name, value in params.extra_args.items():
        if str(name).startswith("callback") or callable(value):
            raise SamplingParamsError(
                f"AsyncOmni takes no {name}: the pipeline runs in other processes. Read the events of generate() "
                "instead: RequestProgress at every step, with pictures where previews=True; abort(request_id) stops it",
                param=str(name),
            )


def _batching(max_size: int, wait_ms: float) -> Batching:
    require_int("max_batch_size", max_size, minimum=1, error=ConfigError, hint="give a whole number from 1 on")
    hint = "give a number of milliseconds from 0 on"
    require_number("batch_wait_ms", wait_ms, minimum=0.0, below=1e6, error=ConfigError, hint=hint)
    return Batching(max_size=max_size, wait_s=wait_ms / 1000)
