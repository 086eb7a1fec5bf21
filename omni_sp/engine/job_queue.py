"""The jobs that wait and run, in order, whoever runs them."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from omni_sp.engine.batching import Batching
from omni_sp.engine.jobs import EngineStats, Job
from omni_sp.engine.messages import Done, Progress
from omni_sp.errors import (
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
    UnsupportedModelError,
)
from omni_sp.pipelines.capabilities import PipelineCapabilities

DRAINING, CLOSED, FAILED = "draining", "closed", "failed"
IDLE_S = 0.5
"""While no job comes, so often whoever takes jobs gets none."""


class Running:
    """The jobs of one call, the name of that call, and what has the ranks leave it before its next step."""

    def __init__(self, jobs: list[Job], number: int, abort: Callable[[str], None]) -> None:
        self.jobs, self.abort = jobs, abort
        # A name of its own: an abort of this call is not one of a later call for one of them alone.
        self.name = f"batch {number} of {len(jobs)} requests" if len(jobs) > 1 else jobs[0].call.request_id


class JobQueue:
    """Jobs by priority and arrival. Whoever is free takes the first, so that the least loaded one gets it.

    Args:
        batching: which jobs may share a call.
        max_length: jobs that may wait; None for any number.

    Attributes:
        lock: held while anything here is read or changed; notified of every change.
        over: DRAINING, CLOSED or FAILED once no more jobs are taken in; None before.
        batching: as given.
        counts: of jobs, calls and restarts.
    """

    def __init__(self, batching: Batching, max_length: int | None) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.over: str | None = None
        self.batching, self._max_length = batching, max_length
        self.counts = EngineStats()
        self._waiting: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._running: list[Running] = []
        self._numbers = itertools.count()

    @property
    def stats(self) -> EngineStats:
        """Counts; a copy."""
        with self.lock:
            now = {"queued": len(self._waiting), "running": self.num_running}
            return replace(self.counts, start_s=dict(self.counts.start_s), **now)

    @property
    def num_running(self) -> int:
        """Jobs that run."""
        return sum(len(one.jobs) for one in self._running)

    def submit(self, job: Job, capabilities: PipelineCapabilities | None) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: too many wait.
            SamplingParamsError: its request_id is in use.
        """
        with self.lock:
            if self._max_length is not None and len(self._waiting) >= self._max_length:
                raise QueueFullError(f"{len(self._waiting)} requests wait already, which is the most: try again later")
            if job.call.request_id in self._jobs:
                raise SamplingParamsError(f"request_id={job.call.request_id!r} is in use: give another one, or none")
            job.number, job.arrived = next(self._numbers), time.monotonic()
            job.key = None if capabilities is None else self.batching.key(capabilities, job.call)
            self._jobs[job.call.request_id] = job
            heapq.heappush(self._waiting, job)
            self._notify_positions()
            self.lock.notify_all()

    def take(self, abort: Callable[[str], None]) -> Running | bool:
        """The jobs to run now, in one call; True where none has come for a while, and False when it is over.

        Args:
            abort: called with the name of that call where all its jobs are aborted.
        """
        with self.lock:
            until = time.monotonic() + IDLE_S
            while self.over is None and (wait_s := self._wait_s()) != 0:
                idle_s = until - time.monotonic()
                if idle_s <= 0:
                    return True
                self.lock.wait(idle_s if wait_s is None else min(wait_s, idle_s))
            if not self._waiting or self.over in (CLOSED, FAILED):
                return False
            jobs = self._first()
            self._waiting = [job for job in self._waiting if job not in jobs]
            heapq.heapify(self._waiting)
            running = Running(jobs, next(self._numbers), abort)
            self._running.append(running)
            self._notify_positions()
            return running

    def finish(self, running: Running, results: Sequence[Done | OmniSPError]) -> None:
        """Report what became of the jobs of a call; those that deserve another try wait again."""
        with self.lock:
            self._running.remove(running)
            jobs = running.jobs
            if isinstance(results[0], Done):
                self._note_call(results[0])
            elif isinstance(results[0], UnsupportedModelError) and len(jobs) > 1:
                self.batching.refused.add(jobs[0].key)
            for job, result in zip(jobs, results, strict=True):
                if self._deserves_another_try(job, result, batch=len(jobs) > 1):
                    heapq.heappush(self._waiting, job)
                else:
                    self.end(job, result)
            self._notify_positions()
            self.lock.notify_all()

    def abort(self, request_id: str) -> bool:
        """Leave a job: at once if it waits, before its next step if it runs.

        A job of a batch ends at once, while the ranks go on for the others.

        Returns:
            False where there is no job of that name.
        """
        with self.lock:
            job = self._jobs.get(request_id)
            if job is None:
                return False
            job.is_aborted = True
            for running in self._running:
                if job in running.jobs:
                    if all(one.is_aborted for one in running.jobs):
                        running.abort(running.name)
                    else:
                        self.end(job, RequestAbortedError(f"{request_id} was aborted"))
                    return True
            self._waiting.remove(job)
            heapq.heapify(self._waiting)
            self.end(job, RequestAbortedError(f"{request_id} was aborted before it began"))
            self._notify_positions()
            return True

    def note(self, jobs: list[Job], news: Progress) -> None:
        """Tell the jobs of a call how far it is."""
        with self.lock:
            self.counts.steps += news.done > 0 and not news.note
            each = len(news.previews) // len(jobs)
            for place, job in enumerate(jobs):
                if not job.is_over:
                    shown = news.previews[place * each : (place + 1) * each] if job.call.previews else ()
                    job.on_progress(replace(news, previews=shown))

    def fail_waiting(self, error: OmniSPError) -> None:
        """End all jobs that wait."""
        with self.lock:
            for job in sorted(self._waiting):
                self.end(job, error)
            self._waiting.clear()

    def fail_running(self, error: OmniSPError) -> None:
        """End all jobs that run, for those who asked for them."""
        with self.lock:
            for job in [job for running in self._running for job in running.jobs]:
                self.end(job, error)

    def end(self, job: Job, result: Done | OmniSPError) -> None:
        """Report a job's end; the second time, do nothing."""
        with self.lock:
            if job.is_over:
                return
            job.is_over = True
            self._jobs.pop(job.call.request_id, None)
            self.counts.count(result)
            job.on_end(result)

    def _first(self) -> list[Job]:
        """The first job in the queue, and those that may share its call. Under the lock."""
        ordered = sorted(self._waiting)
        mates = [job for job in ordered[1:] if job.key is not None and job.key == ordered[0].key]
        return [ordered[0], *mates[: self.batching.max_size - 1]]

    def _wait_s(self) -> float | None:
        """How long to wait for jobs, or for more of them; None until one comes. Under the lock."""
        if not self._waiting:
            return None
        first = self._first()
        if first[0].key is None or len(first) == self.batching.max_size:
            return 0
        return max(0.0, first[0].arrived + self.batching.wait_s - time.monotonic())

    def _deserves_another_try(self, job: Job, result: Done | OmniSPError, *, batch: bool) -> bool:
        """Under the lock; notes that the job has had it."""
        if isinstance(result, (Done, RequestAbortedError)) or job.is_aborted or job.is_over or self.over is not None:
            return False
        died = isinstance(result, RankFailedError) and result.kind == "died"
        if not batch and (not died or job.was_retried):
            return False
        job.was_retried, job.key = True, None
        return True

    def _note_call(self, done: Done) -> None:
        """Under the lock."""
        self.counts.calls += 1
        if done.result is not None:
            self.counts.denoise_s += done.result.timings.get("denoise_s", 0.0)
            self.counts.steps_done += done.result.timings.get("num_steps", 0)

    def _notify_positions(self) -> None:
        """Under the lock."""
        for position, job in enumerate(sorted(self._waiting), start=self.num_running):
            if job.position != position:
                job.position = position
                job.on_position(position)
