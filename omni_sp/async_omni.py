"""AsyncOmni: many requests at once from an asyncio program; a queue, progress, aborts, and ranks that come back."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.batching import Batching
from omni_sp.engine.dispatcher import Dispatcher
from omni_sp.engine.jobs import EngineStats, Job
from omni_sp.engine.messages import Call, Done, Progress, Ready
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.ranks.torchrun import inside_distributed_program
from omni_sp.engine.ranks.torchrun_supervised import TorchrunLauncher, job_rank, require_job_of, supervise_rank
from omni_sp.engine.startup import warm_up_errors_named
from omni_sp.errors import ConfigError, EngineClosedError, OmniSPError
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress, RequestQueued
from omni_sp.pipelines.arguments import call_arguments, warm_up_arguments
from omni_sp.requests import (
    Model,
    PromptInput,
    engine_options,
    output_of,
    parse_prompt,
    require_known,
    require_params,
)

__all__ = ["AsyncOmni", "EngineStats"]

_DRAIN_S = 30.0
_POLL_S = 0.05
_NEW_SEED = 2**31


class AsyncOmni:
    """A diffusers pipeline on rank processes, for many requests at once, drawn one by one or a few together.

    ``async with AsyncOmni(model, ...) as omni`` starts and ends it; ``start()`` and ``close()`` do so by hand. When a
    rank dies, raises or falls silent, its ranks are ended and started anew; requests in the queue stay there. A request
    whose ranks died under it is tried once more; one whose ranks raised fails with that error.

    Under torchrun, on one machine or several, the program gets past ``start()`` in the process of rank 0 alone. Each of
    the others carries a rank, which can die and be started anew there, and exits when rank 0's is over.

    Args:
        model, parallel_config: as for Omni. One rank, too, is a process of its own.
        max_queue_length: requests that may wait; None for any number.
        max_batch_size: prompts that may share a call of the pipeline, where they are alike but for prompt, negative
            prompt and seed. Each gets the picture that it gets alone, to rounding: the start draws small pictures both
            ways, and where they differ, requests are drawn one by one (``on_news`` says so).
        batch_wait_ms: how long such a request may wait for others when the ranks are free.
        warmup: (height, width) of pictures that are drawn, a step each, before it is ready. Where the pipeline starts
            from pictures, plain grey ones are given to it.
        on_news: told in a few words what a start is doing. launcher: starts the rank processes; by default on this
            machine.
        options: device, dtype, attention_backend, attention_strategy, rank_timeout_s (it bounds the time between two
            steps) and startup_timeout_s, as for Omni.

    Raises:
        ConfigError, ModelNotFoundError: as for Omni; anything else is raised by ``start()``.
    """

    def __init__(
        self,
        model: Model,
        parallel_config: DiffusionParallelConfig | None = None,
        *,
        max_queue_length: int | None = None,
        max_batch_size: int = 1,
        batch_wait_ms: float = 0.0,
        warmup: Sequence[tuple[int, int]] = (),
        on_news: Callable[[str], None] | None = None,
        launcher: Launcher | None = None,
        **options: object,
    ) -> None:
        require_known(options, AsyncOmni)
        self._warmup = tuple(warmup)
        self._options = engine_options(model, parallel_config, **options)  # type: ignore[arg-type]  # checked there
        self.is_front = True
        if launcher is None and inside_distributed_program():
            require_job_of(self._options.config)
            self.is_front = job_rank() == 0
            launcher = TorchrunLauncher() if self.is_front else None
        self._dispatcher = Dispatcher(
            self._options,
            launcher or SpawnLauncher(thread_stays=True),
            warm_up=self._warm_up_calls,
            max_queue_length=max_queue_length,
            on_news=on_news or (lambda _news: None),
            batching=_batching(max_batch_size, batch_wait_ms),
        )

    @property
    def status(self) -> str:
        """One of: starting, ready, restarting, draining, closed, failed (the ranks would not start again)."""
        return self._dispatcher.status

    @property
    def info(self) -> Ready:
        """What is loaded and where: ``facts`` of the pipeline, ``layout`` of the ranks, ``device``, ``dtype``.

        Raises:
            EngineClosedError: it has not started yet.
        """
        ready = self._dispatcher.ready
        if ready is None:
            raise EngineClosedError("AsyncOmni has not started yet: await start(), or use it with `async with`")
        return ready

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        return self._dispatcher.stats

    async def start(self) -> None:
        """Load the model on the ranks and warm up. The second time, do nothing.

        Raises:
            InvalidInputError, RankFailedError: as Omni's constructor.
            SystemExit: in a process of torchrun other than rank 0's, once rank 0's is over.
        """
        if not self.is_front:
            supervise_rank(self._options.config, self._options.device)
            raise SystemExit(0)
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()

        def on_started(error: BaseException | None) -> None:
            def report() -> None:
                if not started.done():
                    started.set_result(None) if error is None else started.set_exception(error)

            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(report)

        if self._dispatcher.start(on_started):
            await started

    async def drain(self, timeout_s: float = _DRAIN_S) -> None:
        """Refuse new requests, fail waiting ones, let the running one finish within so many seconds, and close."""
        self._dispatcher.drain()
        until = time.monotonic() + timeout_s
        while not self._dispatcher.is_idle and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        await self.close()

    async def close(self) -> None:
        """End the ranks. What is under way or waits fails with EngineClosedError. Idempotent."""
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
        """Draw one prompt and tell how it goes: RequestQueued, RequestProgress …, then RequestDone or RequestFailed.

        Leaving the iteration early (``aclose()``) aborts the request.

        Args:
            prompt, sampling_params: as for Omni.generate. request_id: a name of your own. priority: higher ones come
                first, equal ones in the order of arrival. previews: small pictures along with some of the steps.

        Raises:
            SamplingParamsError: bad input; nothing was queued. QueueFullError: too many wait.
            EngineClosedError: it is draining, closed or has failed, or has not started yet.
        """
        params, parsed, capabilities = require_params(sampling_params), parse_prompt(prompt), self.info.capabilities
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[RequestEvent] = asyncio.Queue()
        name = request_id or f"request-{uuid.uuid4().hex}"

        def report(event: RequestEvent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        def on_progress(news: Progress) -> None:
            shown = news.previews
            preview = next(iter(shown), None)
            report(RequestProgress(request_id=name, done=news.done, total=news.total, preview=preview, previews=shown))

        def on_end(result: Done | OmniSPError) -> None:
            if isinstance(result, Done):
                startup_s = sum(self.stats.start_s.values())
                output = output_of(self.info, job.call, parsed, params, result, startup_s=startup_s)
                report(RequestDone(request_id=name, output=output))
            else:
                report(RequestFailed(request_id=name, error=result))

        job = Job(
            call=Call(
                request_id=name,
                arguments=call_arguments(capabilities, parsed, params),
                seeds=(secrets.randbelow(_NEW_SEED) if params.seed is None else params.seed,),
                can_be_aborted=True,
                previews=previews,
            ),
            priority=priority,
            on_position=lambda position: report(RequestQueued(request_id=name, position=position)),
            on_progress=on_progress,
            on_end=on_end,
        )
        self._dispatcher.submit(job)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, (RequestDone, RequestFailed)):
                    return
        finally:
            if not job.is_over:
                self._dispatcher.abort(name)

    async def abort(self, request_id: str) -> bool:
        """Stop a request: at once if it waits, at the next step if it runs. False where there is none of that name."""
        return self._dispatcher.abort(request_id)

    def _warm_up_calls(self, ready: Ready) -> list[Call]:
        calls = []
        for height, width in self._warmup:
            name = f"{width} x {height}"
            with warm_up_errors_named(name):
                arguments = warm_up_arguments(ready.capabilities, height, width)
            calls.append(Call(request_id=name, arguments=arguments, seeds=(0,)))
        return calls


def _batching(max_size: int, wait_ms: float) -> Batching:
    if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1:
        raise ConfigError(f"max_batch_size={max_size!r}: give a whole number from 1 on")
    if isinstance(wait_ms, bool) or not isinstance(wait_ms, (int, float)) or not 0 <= wait_ms < 1e6:
        raise ConfigError(f"batch_wait_ms={wait_ms!r}: give a number of milliseconds from 0 on")
    return Batching(max_size=max_size, wait_s=wait_ms / 1000)
