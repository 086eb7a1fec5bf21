"""The engine whose one rank is this very process: alone, or as a rank of the user's own distributed program."""

from __future__ import annotations

import secrets
import threading
import traceback
from dataclasses import replace

from omni_sp.collectives import gather_ints, require_equal
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Ready
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.engine.ranks.torchrun import join
from omni_sp.engine.startup import IMPORTS, JOINING, WEIGHTS, Startup, reading_text
from omni_sp.engine.worker import is_out_of_memory
from omni_sp.errors import EngineClosedError, InvalidInputError, OmniSPError, RankFailedError
from omni_sp.mesh import ParallelMesh

_NEW_SEED = 2**31


class InPlaceEngine:
    """Runs every call here. Joined to other ranks, each of them makes the same calls in the same order.

    Raises:
        ConfigError: the degrees are not those of the program around, or there are too few GPUs.
    """

    def __init__(self, options: EngineOptions, start: Startup, *, joined: bool) -> None:
        self._closed: str | None = None
        self._lock = threading.Lock()
        if joined:
            device = join(options.config, options.device, options.rank_timeout_s)
        else:
            device = rank_devices(options.device, options.config)[0]
        self._mesh = ParallelMesh(options.config)
        self.start = start
        if not self.is_main:
            start.mute()

        def on_component(part: str, done: int, total: int) -> None:
            start.report(WEIGHTS, reading_text(part, done, total), done, total)

        start.report(IMPORTS, f"loading {options.source.name}")
        self._runner = PipelineRunner(options, device, on_component=on_component)
        start.report(JOINING, "spreading the model over the ranks" if self._mesh.world_size > 1 else "getting ready")
        self._ready = self._runner.parallelize(self._mesh)

    @property
    def ready(self) -> Ready:
        """What is loaded, where."""
        return replace(self._ready, start_s=dict(self.start.seconds))

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self._mesh.rank == 0

    def new_seed(self) -> int:
        """A seed at random; all ranks get the one that rank 0 drew."""
        self._require_open()
        return gather_ints([secrets.randbelow(_NEW_SEED)], self._mesh.world)[0][0]

    def run(self, call: Call, on_progress: OnProgress | None) -> Done:
        """Run one call here.

        Raises:
            InvalidInputError: the pipeline refused the call.
            ShardingError: the ranks around make different calls.
            RankFailedError: anything else that the pipeline raised, which is its cause.
            EngineClosedError: it had been closed before.
        """
        with self._lock:
            self._require_open()
            return self._run(call, on_progress)

    def _run(self, call: Call, on_progress: OnProgress | None) -> Done:
        try:
            self._require_same(call)
            if call.check:
                return self._runner.check(call)
            return self._runner.run(call, on_progress)
        except Exception as error:
            self._note(error)
            if isinstance(error, OmniSPError):
                raise
            rank, size = self._mesh.rank, self._mesh.world_size
            raise RankFailedError(
                f"rank {rank} of {size} raised {type(error).__name__}: {error}",
                rank=rank,
                kind="out_of_memory" if is_out_of_memory(error) else "raised",
                rank_traceback=traceback.format_exc(),
            ) from error
        except BaseException as error:
            self._note(error)
            raise

    def close(self) -> None:
        """Give the pipeline's memory back. Idempotent. A joined group lives on: the program may use it elsewhere."""
        if self._closed is None:
            self._closed = "close() was called"
            self._runner.close()

    def _require_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(f"this Omni is closed: {self._closed}; make a new one")

    def _note(self, error: BaseException) -> None:
        """Ranks that stopped in the middle may stand at different points; another call could hang.

        A refusal is different: it comes before any exchange, to all ranks alike.
        """
        if self._mesh.world_size > 1 and self._closed is None and not isinstance(error, InvalidInputError):
            self._closed = f"an earlier call failed: {str(error) or type(error).__name__}"

    def _require_same(self, call: Call) -> None:
        """Refuse calls that differ between ranks, in what can be compared cheaply, on all ranks alike."""
        plain = {name: value for name, value in call.arguments.items() if isinstance(value, (int, float, str))}
        require_equal(
            self._mesh.world,
            "ranks {ranks} were asked for something else than rank 0: every rank of the program makes the same calls "
            "in the same order",
            call=(sorted(plain.items()), call.seeds),
        )
