"""A queue in front of the ranks, and ranks that come back: one call after the other, whatever becomes of any."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from omni_sp.engine.engine import RankEngine
from omni_sp.engine.launch import Launcher
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Progress, Ready
from omni_sp.errors import (
    EngineClosedError,
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)

STARTING, READY, RESTARTING, DRAINING, CLOSED, FAILED = (
    "starting", "ready", "restarting", "draining", "closed", "failed",
)  # fmt: skip
_OVER = (DRAINING, CLOSED, FAILED)
RESTART_AFTER_S = (0.0, 1.0, 5.0, 15.0)
"""Pauses before the first, second, … attempt in a row to start the ranks again; after the last one it is over."""
_JOIN_S = 30.0


@dataclass
class EngineStats:
    """Counts since the start, for people and for monitoring.

    Attributes:
        queued, running: requests now. done, failed, aborted: requests so far. restarts: of the ranks.
        steps: denoising steps so far. denoise_s: seconds that the steps of finished requests took, and steps_done their
            number. start_s: seconds of the last start, by part.
    """

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    aborted: int = 0
    restarts: int = 0
    steps: int = 0
    denoise_s: float = 0.0
    steps_done: int = 0
    start_s: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False, kw_only=True)
class Job:
    """A call and whom to tell about it. Everything is told from the dispatcher's threads, and must not block.

    Attributes:
        priority: higher ones come first, equal ones in the order of arrival.
        on_position: told how many come before it, running ones too, whenever that changes. on_progress: told of steps.
        on_end: told once, with what rank 0 answered or with the error.
    """

    call: Call
    priority: int
    on_position: Callable[[int], None]
    on_progress: OnProgress
    on_end: Callable[[Done | OmniSPError], None]
    number: int = 0
    position: int = -1
    is_over: bool = False
    is_aborted: bool = False
    was_retried: bool = False

    def __lt__(self, other: Job) -> bool:
        return (-self.priority, self.number) < (-other.priority, other.number)


class Dispatcher:
    """Owns rank processes, and gives them one job after the other.

    When a rank dies, raises or falls silent, all are ended and started anew; waiting jobs wait on. A job whose ranks
    died under it is tried once more, by no fault of its own as far as anybody knows; one whose ranks raised fails.

    Args:
        options: what the ranks run. launcher: starts them. warm_up: the calls to run before the first job.
        max_queue_length: jobs that may wait; None for any number. on_news: told what a start is doing.
    """

    def __init__(
        self,
        options: EngineOptions,
        launcher: Launcher,
        *,
        warm_up: Callable[[Ready], Sequence[Call]],
        max_queue_length: int | None,
        on_news: Callable[[str], None],
    ) -> None:
        self._options, self._launcher = options, launcher
        self._warm_up, self._max_queue_length, self._on_news = warm_up, max_queue_length, on_news
        self._lock = threading.Condition(threading.RLock())
        self._queue: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._running: Job | None = None
        self._engine: RankEngine | None = None
        self._error: BaseException | None = None
        self._stats = EngineStats()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self.status = STARTING
        self.ready: Ready | None = None

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        with self._lock:
            now = {"queued": len(self._queue), "running": int(self._running is not None)}
            return replace(self._stats, start_s=dict(self._stats.start_s), **now)

    @property
    def is_idle(self) -> bool:
        """True while no job runs."""
        return self._running is None

    def start(self, settle: Callable[[BaseException | None], None]) -> bool:
        """Begin to load; ``settle`` is told the outcome. False where it has begun before."""
        if self._thread is not None:
            return False
        # Ranks end with the thread that started them, so that thread stays.
        self._thread = threading.Thread(target=self._live, args=(settle,), name="omni-sp-dispatcher", daemon=True)
        self._thread.start()
        return True

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: too many wait. SamplingParamsError: its request_id is in use.
            EngineClosedError: it is draining, closed, or has failed.
        """
        with self._lock:
            if self.status in _OVER:
                reason = f": {self._error}" if self._error is not None else ""
                raise EngineClosedError(f"AsyncOmni is {self.status}{reason}")
            if self._max_queue_length is not None and len(self._queue) >= self._max_queue_length:
                raise QueueFullError(f"{len(self._queue)} requests wait already, which is the most: try again later")
            name = job.call.request_id
            if name in self._jobs:
                raise SamplingParamsError(f"request_id={name!r} is in use: give another one, or none")
            job.number = next(self._numbers)
            self._jobs[name] = job
            heapq.heappush(self._queue, job)
            self._tell_positions()
            self._lock.notify_all()

    def abort(self, request_id: str) -> bool:
        """Leave a job: at once if it waits, before its next step if it runs. False where there is none of that name."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is None:
                return False
            job.is_aborted = True
            if job is self._running:
                if self._engine is not None:
                    self._engine.abort(request_id)
                return True
            self._queue.remove(job)
            heapq.heapify(self._queue)
            self._end(job, RequestAbortedError(f"{request_id} was aborted before it began"))
            self._tell_positions()
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
            if self._running is not None:
                self._end(self._running, closed)
            self._fail_waiting(closed)
            self._lock.notify_all()
            engine, thread = self._engine, self._thread
        if engine is not None:
            engine.close()
        if thread is not None:
            thread.join(_JOIN_S)

    def _live(self, settle: Callable[[BaseException | None], None]) -> None:
        """The thread that owns the ranks."""
        try:
            self._start_ranks()
        except BaseException as error:
            self._give_up(error)
            settle(error)
            return
        settle(None)
        while (job := self._next()) is not None:
            self._run(job)
        if self._engine is not None:
            self._engine.close()

    def _next(self) -> Job | None:
        """The job to run now; None when it is over."""
        with self._lock:
            while not self._queue and self.status not in _OVER:
                self._lock.wait()
            if not self._queue or self.status in (CLOSED, FAILED):
                return None
            self._running = heapq.heappop(self._queue)
            self._tell_positions()
            return self._running

    def _run(self, job: Job) -> None:
        assert self._engine is not None
        engine = self._engine
        result: Done | OmniSPError
        try:
            result = engine.run(job.call, lambda news: self._note(job, news))
        except OmniSPError as error:
            result = error
        except BaseException as error:
            result = RankFailedError(f"{type(error).__name__}: {error}", rank=0)
        with self._lock:
            self._running = None
            died = isinstance(result, RankFailedError) and not result.rank_traceback
            if died and not (job.was_retried or job.is_aborted or job.is_over or self.status in _OVER):
                job.was_retried = True
                heapq.heappush(self._queue, job)
            else:
                self._end(job, result)
            self._tell_positions()
        if not engine.is_open:
            self._restart()

    def _note(self, job: Job, news: Progress) -> None:
        with self._lock:
            self._stats.steps += news.done > 0
            if not job.is_over:
                job.on_progress(news)

    def _start_ranks(self) -> None:
        began = time.monotonic()
        engine = RankEngine(self._options, self._on_news, self._launcher, lambda: self.status == CLOSED)
        loaded = time.monotonic()
        with self._lock:
            self._engine, self.ready = engine, engine.ready
        for call in self._warm_up(engine.ready):
            self._on_news(f"warming up: {call.request_id}")
            engine.run(call, None)
        with self._lock:
            self._stats.start_s = {"load": loaded - began, "warm_up": time.monotonic() - loaded}
            if self.status in (STARTING, RESTARTING):
                self.status = READY
            over = self.status == CLOSED
        if over:  # closed while it loaded
            engine.close()

    def _restart(self) -> None:
        """Start the ranks again, with longer and longer pauses."""
        last: BaseException = EngineClosedError("no attempt was made")
        for pause in RESTART_AFTER_S:
            with self._lock:
                if self._lock.wait_for(lambda: self.status in _OVER, pause) or self.status in _OVER:
                    return
                self.status = RESTARTING
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
        """Tell a job's end; the second time, do nothing. Under the lock."""
        if job.is_over:
            return
        job.is_over = True
        self._jobs.pop(job.call.request_id, None)
        if isinstance(result, Done):
            self._stats.done += 1
            if result.result is not None:
                self._stats.denoise_s += result.result.timings.get("denoise_s", 0.0)
                self._stats.steps_done += result.result.timings.get("num_steps", 0)
        elif isinstance(result, RequestAbortedError):
            self._stats.aborted += 1
        else:
            self._stats.failed += 1
        job.on_end(result)

    def _tell_positions(self) -> None:
        """Under the lock."""
        for position, job in enumerate(sorted(self._queue), start=int(self._running is not None)):
            if job.position != position:
                job.position = position
                job.on_position(position)
