"""A request in the dispatcher's hands, and the counts of all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from omni_sp.engine.messages import Call, Done, OnProgress
from omni_sp.errors import OmniSPError


@dataclass
class EngineStats:
    """Counts since the start, for people and for monitoring.

    Attributes:
        queued, running: requests now. done, failed, aborted: requests so far. restarts: of the ranks.
        calls: of the pipeline that were done; each is for one request, or for a batch of them.
        steps: denoising steps so far. denoise_s: seconds that the steps of finished calls took, and steps_done their
            number. start_s: seconds of the last start, by part.
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


@dataclass(eq=False, kw_only=True)
class Job:
    """A call and whom to tell about it. Everything is told from the dispatcher's threads, and must not block.

    Attributes:
        priority: higher ones come first, equal ones in the order of arrival.
        on_position: told how many come before it, running ones too, whenever that changes. on_progress: told of steps.
        on_end: told once, with what rank 0 answered or with the error.
        key: equal for jobs that may share a call; None for one that runs alone.
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
