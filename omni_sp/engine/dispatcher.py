"""A queue of jobs in front of an engine, and ranks that start again after a failure."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from omni_sp.engine.batching import Batching, merge_calls, split_result
from omni_sp.engine.engine import Engine, require_owner
from omni_sp.engine.jobs import EngineStats, Job
from omni_sp.engine.messages import Call, Done, EngineOptions, Progress, Ready
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.startup import WARM_UP, Startup
from omni_sp.errors import (
    EngineClosedError,
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
    UnsupportedModelError,
)
from omni_sp.pipelines.results import require_finite

STARTING, READY, RESTARTING = "starting", "ready", "restarting"
DRAINING, CLOSED, FAILED = "draining", "closed", "failed"
_OVER = (DRAINING, CLOSED, FAILED)
RESTART_AFTER_S = (0.0, 1.0, 5.0, 15.0)
"""Pauses before the first, second, … attempt in a row to start the ranks again; after the last one it is over."""
_JOIN_S = 30.0
_IDLE_S = 0.5
"""While no job comes, so often it is looked whether the ranks are there."""
_STABLE_S = 30.0


class Dispatcher:
    """Owns rank processes, and gives them one job after the other, or a few at once where that is proven exact.

    When a rank dies (also while nothing runs), raises by itself or falls silent, all are ended and started again;
    waiting jobs keep waiting. A job whose ranks died during its call is tried once more, since it need not be the
    cause; one whose ranks raised fails. Of a batch that failed, each job is tried alone: the cause may be one of them,
    or their number.

    Args:
        warm_up: gives the calls to run before the first job.
        max_queue_length: jobs that may wait; None for any number.
        on_news: called with what a start is doing.
        batching: which jobs may share a call.

    Attributes:
        status: one of the constants above.
        ready: what is loaded, and where; None before the first start.
    """

    def __init__(
        self,
        options: EngineOptions,
        launcher: Launcher,
        *,
        warm_up: Callable[[Ready], Sequence[Call]],
        max_queue_length: int | None,
        on_news: Callable[[str], None],
        batching: Batching | None = None,
    ) -> None:
        self._owner = os.getpid()
        self._options, self._launcher = options, launcher
        self._warm_up, self._max_queue_length, self._on_news = warm_up, max_queue_length, on_news
        self._batching = batching or Batching()
        self._lock = threading.Condition(threading.RLock())
        self._queue: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._running: list[Job] = []
        self._running_as = ""
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._stats = EngineStats()
        self._started = 0.0
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self.status = STARTING
        self.ready: Ready | None = None

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        with self._lock:
            now = {"queued": len(self._queue), "running": len(self._running)}
            return replace(self._stats, start_s=dict(self._stats.start_s), **now)

    @property
    def has_begun(self) -> bool:
        """True once start() was called."""
        return self._thread is not None

    @property
    def is_idle(self) -> bool:
        """True while no job runs."""
        return not self._running

    def start(self, on_started: Callable[[BaseException | None], None]) -> bool:
        """Begin to load. ``on_started`` is called with the outcome. Returns False where it has begun before."""
        if self._thread is not None:
            return False
        # Ranks end with the thread that started them, so that thread stays.
        self._thread = threading.Thread(
            target=self._run_loop, args=(on_started,), name="omni-sp-dispatcher", daemon=True
        )
        self._thread.start()
        return True

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: too many wait.
            SamplingParamsError: its request_id is in use.
            EngineClosedError: it is draining, closed, or has failed, or this is a forked copy of its process.
        """
        require_owner(self._owner)
        with self._lock:
            if self.status in _OVER:
                reason = f": {self._error}" if self._error is not None else ""
                raise EngineClosedError(f"AsyncOmni is {self.status}{reason}")
            if self._max_queue_length is not None and len(self._queue) >= self._max_queue_length:
                raise QueueFullError(f"{len(self._queue)} requests wait already, which is the most: try again later")
            if job.call.request_id in self._jobs:
                raise SamplingParamsError(f"request_id={job.call.request_id!r} is in use: give another one, or none")
            job.number, job.arrived = next(self._numbers), time.monotonic()
            job.key = self._batching.key(self.ready.capabilities, job.call) if self.ready is not None else None
            self._jobs[job.call.request_id] = job
            heapq.heappush(self._queue, job)
            self._notify_positions()
            self._lock.notify_all()

    def abort(self, request_id: str) -> bool:
        """Leave a job: at once if it waits, before its next step if it runs.

        A job of a batch ends at once, while the ranks go on for the others.

        Returns:
            False where there is no job of that name.
        """
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None:
                return False
            job.is_aborted = True
            if job in self._running:
                if all(one.is_aborted for one in self._running):
                    if self._engine is not None:
                        self._engine.abort(self._running_as)
                else:
                    self._end(job, RequestAbortedError(f"{request_id} was aborted"))
                return True
            self._queue.remove(job)
            heapq.heapify(self._queue)
            self._end(job, RequestAbortedError(f"{request_id} was aborted before it began"))
            self._notify_positions()
            return True

    def drain(self) -> None:
        """Take no more jobs, and fail those that wait."""
        with self._lock:
            if self.status not in _OVER:
                self.status = DRAINING
            self._fail_waiting(EngineClosedError("the server is shutting down: try again later"))

    def close(self) -> None:
        """End the ranks; what runs or waits fails. Waits for it, with a bound. Idempotent."""
        with self._lock:
            if self.status != FAILED:
                self.status = CLOSED
            closed = EngineClosedError("AsyncOmni was closed")
            for job in self._running:
                self._end(job, closed)
            self._fail_waiting(closed)
            self._lock.notify_all()
            engine, thread = self._engine, self._thread
        if engine is not None:
            engine.close()
        if thread is not None:
            thread.join(_JOIN_S)
        self._launcher.close()

    def _run_loop(self, on_started: Callable[[BaseException | None], None]) -> None:
        """The thread that owns the ranks."""
        try:
            self._start_ranks(tries_batches=True)
        except BaseException as error:
            self._give_up(error)
            on_started(error)
            return
        on_started(None)
        while (jobs := self._next()) is not None:
            if jobs:
                self._run(jobs)
            else:
                self._look_for_lost_ranks()
        if self._engine is not None:
            self._engine.close()

    def _next(self) -> list[Job] | None:
        """The jobs to run now, in one call; none where none has come for a while, and None when it is over."""
        with self._lock:
            until = time.monotonic() + _IDLE_S
            while self.status not in _OVER and (wait_s := self._wait_s()) != 0:
                idle_s = until - time.monotonic()
                if idle_s <= 0:
                    return []
                self._lock.wait(idle_s if wait_s is None else min(wait_s, idle_s))
            if not self._queue or self.status in (CLOSED, FAILED):
                return None
            jobs = self._first()
            self._queue = [job for job in self._queue if job not in jobs]
            heapq.heapify(self._queue)
            self._running = jobs
            # A name of its own: an abort of this call is not one of a later call for one of them alone.
            batch = f"batch {next(self._numbers)} of {len(jobs)} requests"
            self._running_as = batch if len(jobs) > 1 else jobs[0].call.request_id
            self._notify_positions()
            return jobs

    def _first(self) -> list[Job]:
        """The first job in the queue, and those that may share its call. Under the lock."""
        ordered = sorted(self._queue)
        mates = [job for job in ordered[1:] if job.key is not None and job.key == ordered[0].key]
        return [ordered[0], *mates[: self._batching.max_size - 1]]

    def _wait_s(self) -> float | None:
        """How long to wait for jobs, or for more of them; None until one comes. Under the lock."""
        if not self._queue:
            return None
        first = self._first()
        if first[0].key is None or len(first) == self._batching.max_size:
            return 0
        return max(0.0, first[0].arrived + self._batching.wait_s - time.monotonic())

    def _run(self, jobs: list[Job]) -> None:
        assert self._engine is not None
        engine = self._engine
        results: Sequence[Done | OmniSPError]
        try:
            results = self._answers(engine, jobs)
        except OmniSPError as error:
            results = [error] * len(jobs)
        except BaseException as error:
            results = [RankFailedError(f"{type(error).__name__}: {error}", rank=0)] * len(jobs)
        with self._lock:
            self._running = []
            if isinstance(results[0], Done):
                self._note_call(results[0])
            elif isinstance(results[0], UnsupportedModelError) and len(jobs) > 1:
                self._batching.refused.add(jobs[0].key)
            for job, result in zip(jobs, results, strict=True):
                if self._deserves_another_try(job, result, batch=len(jobs) > 1):
                    heapq.heappush(self._queue, job)
                else:
                    self._end(job, result)
            self._notify_positions()
        if not engine.is_open and self.status not in _OVER:
            self._on_news(f"the ranks start again: {results[0]}")
            self._restart(RESTART_AFTER_S)

    def _look_for_lost_ranks(self) -> None:
        """Start the ranks again where one of them has ended while nothing ran."""
        assert self._engine is not None
        try:
            self._engine.require_alive()
        except RankFailedError as error:
            if self.status in _OVER:  # close() in another thread has ended it
                return
            self._on_news(f"the ranks start again: {error}")
            # One that ends soon after every start must not be started all the time.
            is_stable = time.monotonic() - self._started > _STABLE_S
            self._restart(RESTART_AFTER_S if is_stable else RESTART_AFTER_S[1:])

    def _answers(self, engine: Engine, jobs: list[Job]) -> list[Done]:
        """One call for all of them; what Engine.run raises is raised, and NonFiniteResultError."""
        calls = [job.call for job in jobs]
        call = calls[0] if len(jobs) == 1 else merge_calls(self._running_as, calls)
        done = engine.run(call, lambda news: self._note(jobs, news))
        require_finite(done.result, engine.ready.capabilities, engine.ready.dtype)
        return [done] if len(jobs) == 1 else split_result(done, calls)

    def _deserves_another_try(self, job: Job, result: Done | OmniSPError, *, batch: bool) -> bool:
        """Under the lock; notes that the job has had it."""
        if isinstance(result, (Done, RequestAbortedError)) or job.is_aborted or job.is_over or self.status in _OVER:
            return False
        died = isinstance(result, RankFailedError) and result.kind == "died"
        if not batch and (not died or job.was_retried):
            return False
        job.was_retried, job.key = True, None
        return True

    def _note(self, jobs: list[Job], news: Progress) -> None:
        with self._lock:
            self._stats.steps += news.done > 0 and not news.note
            each = len(news.previews) // len(jobs)
            for place, job in enumerate(jobs):
                if not job.is_over:
                    shown = news.previews[place * each : (place + 1) * each] if job.call.previews else ()
                    job.on_progress(replace(news, previews=shown))

    def _note_call(self, done: Done) -> None:
        """Under the lock."""
        self._stats.calls += 1
        if done.result is not None:
            self._stats.denoise_s += done.result.timings.get("denoise_s", 0.0)
            self._stats.steps_done += done.result.timings.get("num_steps", 0)

    def _try_batches(self, engine: Engine) -> bool:
        """Learn which jobs may share a call. Returns False where the ranks failed over it; they have ended then."""

        def run(call: Call) -> Done:
            engine.start.report(WARM_UP, "comparing a batch with its prompts alone")
            return engine.run(call, None)

        try:
            self._batching.prove(engine.ready.capabilities, run, self._on_news)
        except RankFailedError as error:
            self._on_news(f"requests are drawn one by one: the ranks failed on a batch: {error}")
            return False
        return True

    def _start_ranks(self, *, tries_batches: bool = False) -> None:
        group = RemoteRanks(self._options, self._launcher)
        engine = Engine(group, Startup(self._on_news), lambda: self.status == CLOSED)
        with self._lock:
            self._engine, self.ready = engine, engine.ready
        try:
            engine.warm_up(self._warm_up(engine.ready))
            # Once is enough: ranks that come later run the same.
            if tries_batches and not self._try_batches(engine):
                self._start_ranks()
                return
        except BaseException:
            engine.close()
            raise
        engine.start.finish()
        with self._lock:
            self._started = time.monotonic()
            self.ready, self._stats.start_s = engine.ready, dict(engine.start.seconds)
            if self.status in (STARTING, RESTARTING):
                self.status = READY
            over = self.status == CLOSED
        if over:  # closed while it loaded
            engine.close()

    def _restart(self, pauses: Sequence[float]) -> None:
        """Start the ranks again, with longer and longer pauses."""
        last: BaseException = EngineClosedError("no attempt was made")
        for pause in pauses:
            with self._lock:
                if self.status in _OVER:
                    return
                self.status = RESTARTING
                if self._lock.wait_for(lambda: self.status in _OVER, pause):
                    return
                self._stats.restarts += 1
            try:
                self._start_ranks()
                return
            except BaseException as error:
                last = error
                self._on_news(f"the ranks did not start again: {error}")
        self._give_up(last)

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            if self.status != CLOSED:
                self.status, self._error = FAILED, error
            self._fail_waiting(EngineClosedError(f"the ranks did not start: {error}"))

    def _fail_waiting(self, error: OmniSPError) -> None:
        """Under the lock."""
        for job in sorted(self._queue):
            self._end(job, error)
        self._queue.clear()

    def _end(self, job: Job, result: Done | OmniSPError) -> None:
        """Report a job's end; the second time, do nothing. Under the lock."""
        if job.is_over:
            return
        job.is_over = True
        self._jobs.pop(job.call.request_id, None)
        self._stats.count(result)
        job.on_end(result)

    def _notify_positions(self) -> None:
        """Under the lock."""
        for position, job in enumerate(sorted(self._queue), start=len(self._running)):
            if job.position != position:
                job.position = position
                job.on_position(position)
