"""The rank that is this very process: alone, or one of the ranks of the user's own distributed program."""

from __future__ import annotations

from collections.abc import Callable

from omni_sp.collectives import gather_ints, require_equal
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Ready
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.engine.ranks.failures import as_message, rank_failed
from omni_sp.engine.ranks.torchrun import join
from omni_sp.engine.startup import IMPORTS, JOINING, WEIGHTS, Startup, reading_text
from omni_sp.errors import InvalidInputError, OmniSPError
from omni_sp.mesh import ParallelMesh


class LocalRank:
    """A RankGroup of which this process is a rank: every call runs here.

    Joined to other ranks, each of them makes the same calls in the same order.

    Args:
        options: what the rank runs.
        joined: this process is a rank of a distributed program.

    Raises:
        ConfigError: the degrees are not those of the program around, or there are too few GPUs.
    """

    def __init__(self, options: EngineOptions, *, joined: bool) -> None:
        self._options = options
        if joined:
            self._device = join(options.config, options.device, options.rank_timeout_s)
        else:
            self._device = rank_devices(options.device, options.config)[0]
        self._mesh = ParallelMesh(options.config)
        self._runner: PipelineRunner | None = None
        self._aborted: set[str] = set()

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self._mesh.rank == 0

    def start(self, startup: Startup, is_cancelled: Callable[[], bool]) -> Ready:  # noqa: ARG002  (nobody else runs)
        """Load the model and parallelize it.

        Args:
            startup: receives what the start is doing; muted on all ranks but the first.
            is_cancelled: not asked, since the caller itself loads.
        """
        if not self.is_main:
            startup.mute()

        def on_component(part: str, done: int, total: int) -> None:
            startup.report(WEIGHTS, reading_text(part, done, total), done, total)

        startup.report(IMPORTS, f"loading {self._options.source.name}")
        self._runner = PipelineRunner(self._options, self._device, on_component=on_component)
        is_alone = self._mesh.world_size == 1
        startup.report(JOINING, "getting ready" if is_alone else "spreading the model over the ranks")
        return self._runner.parallelize(self._mesh)

    def run(self, call: Call, on_progress: OnProgress | None) -> Done:
        """Run one call here.

        Raises:
            InvalidInputError: the pipeline refused the call.
            ShardingError: the ranks around make different calls.
            RequestAbortedError: abort() was called.
            RankFailedError: anything else that the pipeline raised, which is its cause.
        """
        assert self._runner is not None, "start() comes before run()"
        try:
            self._require_same(call)
            if call.check:
                return self._runner.check(call)
            return self._runner.run(call, on_progress, is_aborted=lambda: call.request_id in self._aborted)
        except OmniSPError:
            raise
        except Exception as error:
            raise rank_failed(self._mesh.rank, self._mesh.world_size, as_message(error)) from error
        finally:
            self._aborted.clear()

    def abort(self, request_id: str) -> None:
        """Leave a call before its next step, from another thread; run() then raises."""
        self._aborted.add(request_id)

    def broadcast(self, number: int) -> int:
        """The number that rank 0 gives, on every rank."""
        return gather_ints([number], self._mesh.world)[0][0]

    def survives(self, error: BaseException) -> bool:
        """Whether the ranks stand ready for the next call.

        Ranks that stopped in the middle may stand at different points, and another call could hang. Bad input is
        refused before any exchange, on all ranks alike.
        """
        return self._mesh.world_size == 1 or isinstance(error, InvalidInputError)

    def end(self, patience_s: float = 0.0) -> None:  # noqa: ARG002  (there is no process to wait for)
        """Give the pipeline's memory back. Idempotent. A joined group lives on: the program may use it elsewhere."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _require_same(self, call: Call) -> None:
        """Refuse calls that differ between ranks, in what can be compared cheaply, on all ranks alike."""
        plain = {name: value for name, value in call.arguments.items() if isinstance(value, (int, float, str))}
        require_equal(
            self._mesh.world,
            "ranks {ranks} were asked for something else than rank 0: every rank of the program makes the same calls "
            "in the same order",
            call=(sorted(plain.items()), call.seeds),
        )
