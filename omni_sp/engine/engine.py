"""An engine answers calls of one pipeline. Here: the choice of engine, and the one that starts processes of its own."""

from __future__ import annotations

import pickle
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol

from omni_sp import errors
from omni_sp.engine.messages import (
    Abort,
    Alive,
    Call,
    Done,
    EngineOptions,
    Failed,
    Join,
    Loaded,
    Loading,
    OnProgress,
    Ping,
    Progress,
    RankExited,
    Ready,
)
from omni_sp.engine.ranks import Launcher
from omni_sp.engine.ranks.processes import RankProcesses
from omni_sp.engine.ranks.spawn import SpawnLauncher
from omni_sp.engine.ranks.torchrun import inside_distributed_program
from omni_sp.engine.startup import (
    IMPORTS,
    JOINING,
    WARM_UP,
    WEIGHTS,
    OnNews,
    Startup,
    reading_text,
    warm_up_errors_named,
)
from omni_sp.errors import (
    EngineClosedError,
    InvalidInputError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
)

Failures = dict[int, Failed | RankExited]

_STOP_S = 5.0
_NEW_SEED = 2**31
_POLL_S = 0.5  # how soon a start that is to be given up is
# After a failure, how long to wait for the others' word. A refusal is expected of all of them; behind an echo there is
# a cause; a rank that raised on its own account needs no witness, and the rest may be waiting for it in an exchange.
_SHARED_ERROR_S = 10.0
_PEER_LOSS_S = 3.0
_EXIT_S = 0.3
_PING_S = 2.0  # for the answer to a Ping


class Engine(Protocol):
    """What Omni needs of its ranks, wherever they are."""

    start: Startup
    """Its start; whoever opened it may add a warm-up, and says when it is finished."""

    @property
    def ready(self) -> Ready:
        """What is loaded, where."""

    @property
    def is_main(self) -> bool:
        """True in the one process that shows progress to people."""

    def new_seed(self) -> int:
        """A seed at random, the same on every rank."""

    def run(self, call: Call, on_progress: OnProgress | None) -> Done:
        """Run one call. Raises as Omni.generate does."""

    def close(self) -> None:
        """End it, and every process that it started. Idempotent."""


def open_engine(options: EngineOptions, on_news: OnNews, launcher: Launcher | None = None) -> Engine:
    """Join the ranks of the program around; else run one rank in place; else start processes."""
    joined = inside_distributed_program()
    if options.config.world_size > 1 and not joined:
        return RankEngine(options, on_news, launcher or SpawnLauncher())
    start = Startup(on_news)
    from omni_sp.engine.ranks.local import (
        InPlaceEngine,
    )  # imports diffusers, which a front of other processes never needs

    return InPlaceEngine(options, start, joined=joined)


class RankEngine:
    """The front of several rank processes. Requests go to all of them; one failure ends them all.

    Ranks that are idle wait for their pipe, never inside an exchange. The front waits with a bound, and hears at once
    of a rank that ended.

    Raises:
        InvalidInputError: whatever class of ours the ranks refuse the model with.
        RankFailedError: a rank raised or died while starting.
        EngineClosedError: ``is_to_stop``, which is asked now and then while the ranks load, said so.
    """

    def __init__(
        self,
        options: EngineOptions,
        on_news: OnNews,
        launcher: Launcher,
        is_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self._is_to_stop = is_to_stop
        self._closed: str | None = None
        self._lock = threading.Lock()
        self.start = Startup(on_news)
        self.start.report(IMPORTS, f"starting {options.config.world_size} ranks")
        self._ranks = RankProcesses(options, launcher)
        # An abandoned engine, and the end of the interpreter, end the ranks too.
        self._finalizer = weakref.finalize(self, RankProcesses.end, self._ranks)
        try:
            self._ready = self._start()
        except BaseException as error:
            self._shut_down(f"it did not start: {error}")
            raise

    @property
    def ready(self) -> Ready:
        """What is loaded, where."""
        return replace(self._ready, start_s=dict(self.start.seconds))

    @property
    def is_main(self) -> bool:
        """True: the front speaks for its ranks."""
        return True

    def new_seed(self) -> int:
        """A seed at random."""
        return secrets.randbelow(_NEW_SEED)

    @property
    def is_open(self) -> bool:
        """False once it was closed, or a failure closed it."""
        return self._closed is None

    def abort(self, request_id: str) -> None:
        """Have the ranks leave a call before its next step, from any thread; run() then raises."""
        self._ranks.send(pickle.dumps(Abort(request_id=request_id)))

    def run(self, call: Call, on_progress: OnProgress | None) -> Done:
        """Run one call on all ranks.

        Raises:
            InvalidInputError: every rank refused the call alike; the engine goes on.
            RequestAbortedError: abort() was called; the engine goes on.
            RankFailedError: a rank raised, died, or fell silent; the engine is closed.
            EngineClosedError: it had been closed before.
        """
        try:
            payload = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise SamplingParamsError(f"an argument cannot be sent to the rank processes: {error}") from error
        with self._lock:
            self._require_open()
            try:
                self._ranks.send(payload)
                answers = self._collect(Done, self._options.rank_timeout_s, on_progress=on_progress)
            except (InvalidInputError, RequestAbortedError):
                raise
            except BaseException as error:
                if self._closed is not None:  # close() in another thread
                    raise EngineClosedError(f"the engine was closed during a call: {self._closed}") from error
                self._shut_down(f"an earlier call failed: {str(error) or type(error).__name__}")
                raise
        done: Done = answers[0]
        worst = {stage: max(answer.errors[stage] for answer in answers.values()) for stage in done.errors}
        return replace(done, errors=worst)

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Run calls that nobody waits for, as a part of the start.

        Raises:
            InvalidInputError, RankFailedError: as run(); the message names the call.
        """
        for number, call in enumerate(calls):
            text = f"warming up: {call.request_id}, {number + 1} of {len(calls)}"
            self.start.report(WARM_UP, text, number, len(calls))
            with warm_up_errors_named(call.request_id):
                self.run(call, None)

    def close(self) -> None:
        """End the ranks. Idempotent."""
        if self._closed is None:
            self._closed = "close() was called"
            self._finalizer.detach()
            # Ranks in the middle of a call would not hear a Stop; its caller gets EngineClosedError.
            self._ranks.end(patience_s=0.0 if self._lock.locked() else _STOP_S)

    def _start(self) -> Ready:
        """Loading, then joining; each in lockstep, so that no rank waits in the rendezvous for a slow one."""
        silence = self._options.startup_timeout_s
        self._collect(Loaded, silence, on_loading=self._report_loading)
        self._ranks.send(pickle.dumps(Join()))
        self.start.report(JOINING, "joining the ranks")
        answers = self._collect(Ready, silence)
        ready: Ready = answers[0]
        return ready

    def _report_loading(self, far: Mapping[int, Loading | None]) -> None:
        """How far the slowest rank is. Of a rank, None: it has loaded everything."""
        size = self._ranks.size
        if len(far) < size:
            self.start.report(IMPORTS, f"importing libraries: {len(far)} of {size} ranks have", len(far), size)
            return
        unfinished = [one for one in far.values() if one is not None]
        slowest = min(unfinished, key=lambda one: (one.done, one.part != ""), default=None)
        if slowest is None:
            self.start.report(WEIGHTS, "all weights are read", 1, 1)
        else:
            self.start.report(
                WEIGHTS, reading_text(slowest.part, slowest.done, slowest.total), slowest.done, slowest.total
            )

    def _collect(
        self,
        kind: type,
        silence_s: float,
        on_progress: OnProgress | None = None,
        on_loading: Callable[[Mapping[int, Loading | None]], None] | None = None,
    ) -> dict[int, Any]:
        """One answer of this kind from every rank, or the error that their failures amount to."""
        answers: dict[int, Any] = {}
        failures: Failures = {}
        far: dict[int, Loading | None] = {}
        until = time.monotonic() + silence_s
        while len(answers) + len(failures) < self._ranks.size:
            heard = self._ranks.listen(min(until, time.monotonic() + _POLL_S))
            if self._is_to_stop():
                raise EngineClosedError("it was closed")
            if not heard and time.monotonic() < until:
                continue
            if not heard:
                break
            for rank, message in heard:
                if isinstance(message, (Failed, RankExited)):
                    failures.setdefault(rank, message)
                    until = min(until, time.monotonic() + _wait_after_failure_s(message))
                    continue
                if not failures:
                    until = time.monotonic() + silence_s
                if isinstance(message, kind):
                    answers[rank] = message
                if on_loading is not None and isinstance(message, (Loading, Loaded)):
                    far[rank] = message if isinstance(message, Loading) else None
                    on_loading(far)
                elif isinstance(message, Progress) and on_progress is not None:
                    on_progress(message)
        if failures:
            _raise_for(failures, self._ranks.size, apart=on_loading is not None)
        if len(answers) < self._ranks.size:
            raise self._silence_error({*range(self._ranks.size)} - set(answers), silence_s)
        return answers

    def _silence_error(self, silent: set[int], silence_s: float) -> RankFailedError:
        """The error for ranks that say nothing. Those that give no sign of life are to blame; others wait for them."""
        self._ranks.send(pickle.dumps(Ping()))
        lifeless, until = set(silent), time.monotonic() + _PING_S
        while lifeless and time.monotonic() < until:
            lifeless -= {rank for rank, message in self._ranks.listen(until) if isinstance(message, Alive)}
        way_out = "raise the timeout if the work takes longer than that"
        if lifeless:
            way_out = f"it gives no sign of life, so that its process is stopped or stuck; otherwise {way_out}"
        blamed = sorted(lifeless or silent)
        return RankFailedError(
            f"no word from rank {', '.join(map(str, blamed))} for {silence_s:g} s: {way_out}",
            rank=blamed[0],
            kind="silent",
        )

    def _require_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(f"this Omni is closed: {self._closed}; make a new one")

    def _shut_down(self, reason: str) -> None:
        """End the ranks without ceremony: they may stand anywhere."""
        if self._closed is None:
            self._closed = reason
        self._finalizer.detach()
        self._ranks.end()


class RankTraceback(Exception):  # noqa: N818  (a text that Python prints above the error it caused)
    """Another process's traceback, as the cause of an error here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n\n{text}")


def _wait_after_failure_s(message: Failed | RankExited) -> float:
    if isinstance(message, RankExited):
        return _EXIT_S
    if message.is_shared:
        return _SHARED_ERROR_S
    return _PEER_LOSS_S if message.is_peer_loss else 0.0


def _raise_for(failures: Failures, size: int, *, apart: bool = False) -> NoReturn:
    """Raise what the ranks' failures amount to.

    All ranks refuse (or were aborted) alike: their error, of its own class. Otherwise the root cause: a rank that
    raised on its own account before one that died, and that before one that only lost its peers.

    Args:
        apart: the ranks were each at work of their own, such as files that only rank 0 reads: a refusal needs no other.
    """
    failed = {rank: message for rank, message in failures.items() if isinstance(message, Failed)}
    refusals = {(message.kind, message.message) for message in failed.values() if message.is_shared}
    everybody = len(failed) == size or (apart and len(failed) == len(failures))
    if everybody and len(refusals) == 1 and all(message.is_shared for message in failed.values()):
        rank, message = min(failed.items())
        error_class = getattr(errors, message.kind, InvalidInputError)
        error = error_class(message.message)
        if isinstance(error, errors.SamplingParamsError):
            error.param = message.param
        raise error from RankTraceback(rank, message.traceback)
    rank, cause = min(failures.items(), key=lambda item: (_cause_order(item[1]), item[0]))
    if isinstance(cause, RankExited):
        raise RankFailedError(f"rank {rank} of {size} {_end(cause.exitcode)}", rank=rank, kind="died")
    text = cause.message.strip() or "no message"
    raise RankFailedError(
        f"rank {rank} of {size} raised {cause.kind}: {text}",
        rank=rank,
        kind="out_of_memory" if cause.is_out_of_memory else "raised",
        rank_traceback=cause.traceback,
    ) from RankTraceback(rank, cause.traceback)


def _cause_order(message: Failed | RankExited) -> int:
    if isinstance(message, RankExited):
        return 1
    return 2 if message.is_peer_loss else 0


def _end(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    hint = " (out of memory?)" if exitcode == -9 else ""
    return f"was killed by signal {-exitcode}{hint}"
