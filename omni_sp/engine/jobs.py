"""A request in the dispatcher's queue, and counts of all requests."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from omni_sp.engine.messages import Call, Done, OnProgress
from omni_sp.errors import OmniSPError, RequestAbortedError


@dataclass
class EngineStats:
    """Counts since the start, for people and for monitoring.

    Attributes:
        queued: requests that wait.
        running: requests that run.
        done: requests that ended well.
        failed: requests that ended with an error.
        aborted: requests that somebody aborted.
        restarts: of the ranks.
        calls: finished calls of the pipeline; each is for one request, or for a batch of them.
        steps: denoising steps so far.
        denoise_s: seconds that the steps of finished calls took.
        steps_done: number of the steps of finished calls.
        start_s: seconds of the last start, by part.
    """

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    aborted: int = 0
    restarts: int = 0
    calls: int = 0
    steps: int = 0
    denoise_s: float = 0.0
    steps_done: int = 0
    start_s: dict[str, float] = field(default_factory=dict)

    def count(self, result: Done | OmniSPError) -> None:
        """Count a request by how it ended."""
        if isinstance(result, Done):
            self.done += 1
        elif isinstance(result, RequestAbortedError):
            self.aborted += 1
        else:
            self.failed += 1


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """One of the engines behind a queue.

    Attributes:
        status: starting, ready, restarting, or failed (its ranks would not start again).
        running: requests that it runs.
        calls: that it has finished.
        restarts: of its ranks.
    """

    status: str
    running: int = 0
    calls: int = 0
    restarts: int = 0


@dataclass(eq=False, kw_only=True)
class Job:
    """A call in the queue, and the callbacks for what becomes of it. They run in the dispatcher's threads.

    Attributes:
        priority: higher ones come first, equal ones in the order of arrival.
        on_position: called with the number of jobs before it, running ones too, whenever that changes.
        on_progress: called at every step.
        on_end: called once, with what rank 0 answered or with the error.
        key: equal for jobs that may share a call; None for one that runs alone.
        arrived: the time of its arrival, on the monotonic clock.
        position: jobs before it, as last reported.
    """

    call: Call
    priority: int
    on_position: Callable[[int], None]
    on_progress: OnProgress
    on_end: Callable[[Done | OmniSPError], None]
    key: Hashable | None = None
    number: int = 0
    arrived: float = 0.0
    position: int = -1
    is_over: bool = False
    is_aborted: bool = False
    was_retried: bool = False

    def __lt__(self, other: Job) -> bool:
        return (-self.priority, self.number) < (-other.priority, other.number)
