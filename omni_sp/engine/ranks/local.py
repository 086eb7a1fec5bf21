"""The rank that is this very process: alone, or one of the ranks of the user's own distributed program."""

from __future__ import annotations

from collections.abc import Callable

from typing_extensions import override

from omni_sp.collectives import gather_ints, require_equal
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.messages import Call, Done, EngineOptions, OnProgress, Ready
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.engine.ranks import RankGroup
from omni_sp.engine.ranks.failures import as_message, rank_failed
from omni_sp.engine.ranks.torchrun import join
from omni_sp.engine.startup import IMPORTS, JOINING, WEIGHTS, Startup, reading_text
from omni_sp.errors import InvalidInputError, OmniSPError
from omni_sp.mesh import ParallelMesh


class LocalRank(RankGroup):
    """A RankGroup of which this process is a rank: every call runs here.

    Joined to other ranks, each of them makes the same calls in the same order.

    Args:
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
    @override
    def is_main(self) -> bool:
        return self._mesh.rank == 0

    @override
    def start(self, startup: Startup, is_cancelled: Callable[[], bool]) -> Ready:
        if not self.is_main:
            startup.mute()

        def on_component(part: str, done: int, total: int) -> None:
            startup.report(WEIGHTS, reading_text(part, done, total), done, total)

        startup.report(IMPORTS, f"loading {self._options.source.name}")
        self._runner = PipelineRunner(self._options, self._device, on_component=on_component)
        is_alone = self._mesh.world_size == 1
        startup.report(JOINING, "getting ready" if is_alone else "spreading the model over the ranks")
        return self._runner.parallelize(self._mesh)

    @override
    def run(self, call: Call, on_progress: OnProgress | None) -> Done:
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

    @override
    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    @override
    def broadcast(self, number: int) -> int:
        return gather_ints([number], self._mesh.world)[0][0]

    @override
    def survives(self, error: BaseException) -> bool:
        # Ranks that stopped in the middle may stand at different points, and another call could hang. Bad input is
        # refused before any exchange, on all ranks alike.
        return self._mesh.world_size == 1 or isinstance(error, InvalidInputError)

    @override
    def end(self, patience_s: float = 0.0) -> None:
        # A joined process group stays: the program may use it elsewhere.
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
