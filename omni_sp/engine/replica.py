"""One engine that takes jobs from a queue, in a thread of its own, and whose ranks start again after a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from omni_sp.engine.batching import merge_calls, split_result
from omni_sp.engine.engine import Engine
from omni_sp.engine.job_queue import CLOSED, FAILED, JobQueue, Running
from omni_sp.engine.jobs import ReplicaStats
from omni_sp.engine.messages import Call, Done, EngineOptions, Ready
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.remote import RemoteRanks
from omni_sp.engine.startup import WARM_UP, Startup
from omni_sp.errors import EngineClosedError, OmniSPError, RankFailedError
from omni_sp.pipelines.results import require_finite

STARTING, READY, RESTARTING = "starting", "ready", "restarting"
RESTART_AFTER_S = (0.0, 1.0, 5.0, 15.0)
"""Pauses before the first, second, … attempt in a row to start the ranks again; after the last one it is over."""
_STABLE_S = 30.0
logger = logging.getLogger(__name__)


class Replica:
    """The ranks of one engine, and the thread that owns them.

    When a rank dies (also while nothing runs), raises by itself or falls silent, all ranks of this replica are ended
    and started again. Its job then waits with the others, so that another replica may run it.

    Args:
        options: of the engine.
        launcher: starts its ranks.
        queue: where its jobs come from.
        warm_up: gives the calls to run before the first job.
        on_news: called with what a start is doing.
        on_failed: called once its ranks would not start again.

    Attributes:
        status: STARTING, READY, RESTARTING or FAILED.
        ready: what is loaded, and where; None before the first start.
        engine: of the ranks; None before the first start.
        launcher: as given.
    """

    def __init__(
        self,
        options: EngineOptions,
        launcher: Launcher,
        queue: JobQueue,
        *,
        warm_up: Callable[[Ready], Sequence[Call]],
        on_news: Callable[[str], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.launcher = launcher
        self._options, self._queue = options, queue
        self._warm_up, self._on_news, self._on_failed = warm_up, on_news, on_failed
        self._running: Running | None = None
        self._calls = self._restarts = 0
        self._started = 0.0
        self.engine: Engine | None = None
        self.status = STARTING
        self.ready: Ready | None = None

    @property
    def stats(self) -> ReplicaStats:
        """Its counts; a copy."""
        with self._queue.lock:
            running = len(self._running.jobs) if self._running is not None else 0
            return ReplicaStats(status=self.status, running=running, calls=self._calls, restarts=self._restarts)

    def start(self, on_started: Callable[[BaseException | None], None], *, tries_batches: bool) -> threading.Thread:
        """Begin to load in a thread, which is returned. ``on_started`` is called with the outcome."""
        # Ranks end with the thread that started them, so that thread stays.
        thread = threading.Thread(
            target=self._run_loop, args=(on_started, tries_batches), name="omni-sp-dispatcher", daemon=True
        )
        thread.start()
        return thread

    def close(self) -> None:
        """End the ranks."""
        if self.engine is not None:
            self.engine.close()

    def _run_loop(self, on_started: Callable[[BaseException | None], None], tries_batches: bool) -> None:
        """The thread that owns the ranks."""
        try:
            self._start_ranks(tries_batches=tries_batches)
        except BaseException as error:
            self._give_up(error)
            on_started(error)
            return
        on_started(None)
        taken: Running | bool = False
        try:
            while self.status != FAILED and (taken := self._queue.take(self._abort)):
                if isinstance(taken, Running):
                    self._run(taken)
                else:
                    self._look_for_lost_ranks()
        except BaseException as error:  # with this thread nobody would draw, and nobody would know
            logger.exception("the thread that owns the ranks has failed")
            failure = RankFailedError(f"{type(error).__name__}: {error}", rank=0)
            for job in taken.jobs if isinstance(taken, Running) else []:
                self._queue.end(job, failure)
            self._give_up(failure)
        self.close()

    def _run(self, running: Running) -> None:
        assert self.engine is not None
        engine, self._running = self.engine, running
        results: Sequence[Done | OmniSPError]
        try:
            results = self._answers(engine, running)
        except OmniSPError as error:
            results = [error] * len(running.jobs)
        except BaseException as error:
            results = [RankFailedError(f"{type(error).__name__}: {error}", rank=0)] * len(running.jobs)
        with self._queue.lock:
            self._running = None
            self._calls += isinstance(results[0], Done)
            self._queue.finish(running, results)
        if not engine.is_open and self._queue.over is None:
            self._on_news(f"the ranks start again: {results[0]}")
            self._restart(RESTART_AFTER_S)

    def _abort(self, name: str) -> None:
        if self.engine is not None:
            self.engine.abort(name)

    def _look_for_lost_ranks(self) -> None:
        """Start the ranks again where one of them has ended while nothing ran."""
        assert self.engine is not None
        try:
            self.engine.require_alive()
        except RankFailedError as error:
            if self._queue.over is not None:  # close() in another thread has ended it
                return
            self._on_news(f"the ranks start again: {error}")
            # One that ends soon after every start must not be started all the time.
            is_stable = time.monotonic() - self._started > _STABLE_S
            self._restart(RESTART_AFTER_S if is_stable else RESTART_AFTER_S[1:])

    def _answers(self, engine: Engine, running: Running) -> list[Done]:
        """One call for all of them; what Engine.run raises is raised, and NonFiniteResultError."""
        jobs, calls = running.jobs, [job.call for job in running.jobs]
        call = calls[0] if len(jobs) == 1 else merge_calls(running.name, calls)
        done = engine.run(call, lambda news: self._queue.note(jobs, news))
        require_finite(done.result, engine.ready.capabilities, engine.ready.dtype)
        return [done] if len(jobs) == 1 else split_result(done, calls)

    def _try_batches(self, engine: Engine) -> bool:
        """Learn which jobs may share a call. Returns False where the ranks failed over it; they have ended then."""

        def run(call: Call) -> Done:
            engine.start.report(WARM_UP, "comparing a batch with its prompts alone")
            return engine.run(call, None)

        try:
            self._queue.batching.prove(engine.ready.capabilities, run, self._on_news)
        except RankFailedError as error:
            self._on_news(f"requests are drawn one by one: the ranks failed on a batch: {error}")
            return False
        return True

    def _start_ranks(self, *, tries_batches: bool = False) -> None:
        group = RemoteRanks(self._options, self.launcher)
        engine = Engine(group, Startup(self._on_news), lambda: self._queue.over in (CLOSED, FAILED))
        with self._queue.lock:
            self.engine, self.ready = engine, engine.ready
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
        with self._queue.lock:
            self._started = time.monotonic()
            self.ready, self._queue.counts.start_s = engine.ready, dict(engine.start.seconds)
            self.status = READY
            is_closed = self._queue.over in (CLOSED, FAILED)
        if is_closed:  # closed while it loaded
            engine.close()

    def _restart(self, pauses: Sequence[float]) -> None:
        """Start the ranks again, with longer and longer pauses."""
        last: BaseException = EngineClosedError("no attempt was made")
        for pause in pauses:
            with self._queue.lock:
                if self._queue.over is not None:
                    return
                self.status = RESTARTING
                if self._queue.lock.wait_for(lambda: self._queue.over is not None, pause):
                    return
                self._restarts += 1
                self._queue.counts.restarts += 1
            try:
                self._start_ranks()
                return
            except BaseException as error:
                last = error
                self._on_news(f"the ranks did not start again: {error}")
        self._give_up(last)

    def _give_up(self, error: BaseException) -> None:
        with self._queue.lock:
            self.status = FAILED
        self._on_failed(error)
