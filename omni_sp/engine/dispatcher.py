"""Replicas behind one queue: engines side by side, of which the one that is free takes the next job."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

from omni_sp.engine.batching import Batching
from omni_sp.engine.engine import require_owner
from omni_sp.engine.job_queue import CLOSED, DRAINING, FAILED, JobQueue
from omni_sp.engine.jobs import EngineStats, Job, ReplicaStats
from omni_sp.engine.messages import Call, EngineOptions, Ready
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.replica import READY, RESTARTING, STARTING, Replica
from omni_sp.engine.startup import StartupMessage
from omni_sp.errors import EngineClosedError

_JOIN_S = 30.0
logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns the rank processes of one or more replicas, and gives each one job after the other, or a few at once.

    Jobs share a call where that is proven exact. When the ranks of a replica fail, they are started again, and waiting
    jobs keep waiting, or go to the other replicas. A job whose ranks died during its call is tried once more, since it
    need not be the cause; one whose ranks raised fails. Of a batch that failed, each job is tried alone: the cause may
    be one of them, or their number.

    Args:
        options: of each engine.
        launchers: one for each replica.
        warm_up: gives the calls to run before the first job.
        max_queue_length: jobs that may wait; None for any number.
        on_news: called with what a start is doing.
        batching: which jobs may share a call.

    Attributes:
        queue: the jobs.
        replicas: the engines.
    """

    def __init__(
        self,
        options: EngineOptions,
        launchers: Sequence[Launcher],
        *,
        warm_up: Callable[[Ready], Sequence[Call]],
        max_queue_length: int | None,
        on_news: Callable[[str], None],
        batching: Batching | None = None,
    ) -> None:
        self._owner = os.getpid()
        self.queue = JobQueue(batching or Batching(), max_queue_length)
        self.replicas = [
            Replica(
                options,
                launcher,
                self.queue,
                warm_up=warm_up,
                on_news=partial(_tell, None if len(launchers) == 1 else number, on_news),
                on_failed=self._on_failed,
            )
            for number, launcher in enumerate(launchers)
        ]
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._starting = len(launchers)

    @property
    def status(self) -> str:
        """STARTING until all replicas have started; READY while one of them is; or what the queue says."""
        states = {replica.status for replica in self.replicas}
        if self.queue.over is not None:
            return self.queue.over
        if self._starting and STARTING in states:
            return STARTING
        return next(one for one in (READY, RESTARTING, STARTING, FAILED) if one in states)

    @property
    def ready(self) -> Ready | None:
        """What is loaded, and where: of the first replica that has started; None before."""
        return next((replica.ready for replica in self.replicas if replica.ready is not None), None)

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        return self.queue.stats

    @property
    def replica_stats(self) -> tuple[ReplicaStats, ...]:
        """Counts of each replica; copies."""
        return tuple(replica.stats for replica in self.replicas)

    @property
    def has_begun(self) -> bool:
        """True once start() was called."""
        return bool(self._threads)

    @property
    def is_idle(self) -> bool:
        """True while no job runs."""
        return not self.queue.num_running

    def start(self, on_started: Callable[[BaseException | None], None]) -> bool:
        """Begin to load. ``on_started`` is called with the outcome. Returns False where it has begun before.

        The first replica that does not start at all ends the others: the cause is most likely the same for all.
        """
        if self._threads:
            return False

        def on_replica(error: BaseException | None) -> None:
            with self.queue.lock:
                is_first_error = error is not None and self._starting > 0
                self._starting = 0 if error is not None else self._starting - 1
                is_last = error is None and self._starting == 0
                if is_first_error:
                    assert error is not None
                    self._fail(error)
            if is_first_error:
                for replica in self.replicas:
                    replica.close()
            if is_first_error or is_last:
                on_started(error)

        self._threads = [
            replica.start(on_replica, tries_batches=number == 0) for number, replica in enumerate(self.replicas)
        ]
        return True

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: too many wait.
            SamplingParamsError: its request_id is in use.
            EngineClosedError: it is draining, closed, or has failed, or this is a forked copy of its process.
        """
        require_owner(self._owner)
        with self.queue.lock:
            if self.queue.over is not None:
                reason = f": {self._error}" if self._error is not None else ""
                raise EngineClosedError(f"AsyncOmni is {self.queue.over}{reason}")
            ready = self.ready
            self.queue.submit(job, None if ready is None else ready.capabilities)

    def abort(self, request_id: str) -> bool:
        """Leave a job: at once if it waits, before its next step if it runs. False where there is none of that name."""
        return self.queue.abort(request_id)

    def drain(self) -> None:
        """Take no more jobs, and fail those that wait."""
        with self.queue.lock:
            self.queue.over = self.queue.over or DRAINING
            self.queue.fail_waiting(EngineClosedError("the server is shutting down: try again later"))

    def close(self) -> None:
        """End the ranks; what runs or waits fails. Waits for it, with a bound. Idempotent."""
        with self.queue.lock:
            if self.queue.over != FAILED:
                self.queue.over = CLOSED
            closed = EngineClosedError("AsyncOmni was closed")
            self.queue.fail_running(closed)
            self.queue.fail_waiting(closed)
            self.queue.lock.notify_all()
        for replica in self.replicas:
            replica.close()
        for thread in self._threads:
            thread.join(_JOIN_S)
        for replica in self.replicas:
            replica.launcher.close()

    def _on_failed(self, error: BaseException) -> None:
        """A replica's ranks would not start again. While another one is left, that goes on alone."""
        with self.queue.lock:
            if all(replica.status == FAILED for replica in self.replicas):
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Under the lock."""
        if self.queue.over not in (CLOSED, FAILED):  # of several errors the first is the cause
            self.queue.over, self._error = FAILED, error
        self.queue.fail_waiting(EngineClosedError(f"the ranks did not start: {error}"))
        self.queue.lock.notify_all()


def _tell(number: int | None, on_news: Callable[[str], None], news: str) -> None:
    """Say which replica a message is of, where there are several. Nothing depends on whether it can be said."""
    text = news if number is None else f"replica {number}: {news}"
    if isinstance(news, StartupMessage):
        text = StartupMessage(text, news.part, news.done, news.total)
    try:
        on_news(text)
    except Exception:  # such as a pipe that nobody reads any more
        logger.exception("on_news(%r) failed", text)
