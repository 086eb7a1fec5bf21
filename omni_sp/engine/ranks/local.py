"""The rank that is this very process: alone, or one of the ranks of the user's own distributed program."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from typing_extensions import override

from omni_sp.collectives import gather_ints, require_equal
from omni_sp.engine.devices import rank_devices
from omni_sp.engine.messages import Call, Done, EngineOptions, Failed, OnProgress, Ready
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.engine.ranks import RankGroup
from omni_sp.engine.ranks.failures import are_in_step, as_message, call_failed, rank_failed, wait_after_failure_s
from omni_sp.engine.ranks.torchrun import join
from omni_sp.engine.startup import IMPORTS, JOINING, WEIGHTS, Startup, reading_text
from omni_sp.errors import CallFailedError, InvalidInputError, OmniSPError, RankFailedError, RequestAbortedError
from omni_sp.mesh import ParallelMesh

_SHARED = (InvalidInputError, RequestAbortedError)


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
        self._runner: PipelineRunner | None = None
        self._aborted: set[str] = set()
        self._use(ParallelMesh(options.config))

    def _use(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self._num_calls = 0
        # Where its ranks note their failures: a name that no other engine of the program has.
        self._failures = f"omni_sp/failures/{self.broadcast(secrets.randbits(62))}"

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
        self._runner = PipelineRunner(self._options, self._device, rank=self._mesh.rank, on_component=on_component)
        is_alone = self._mesh.world_size == 1
        startup.report(JOINING, "getting ready" if is_alone else "spreading the model over the ranks")
        return self._runner.parallelize(self._mesh)

    @override
    def run(self, call: Call, on_progress: OnProgress | None, is_aborted: Callable[[], bool]) -> Done:
        assert self._runner is not None, "start() comes before run()"
        self._num_calls += 1
        self._require_same(call)
        try:
            if call.check:
                return self._runner.check(call)
            return self._runner.run(
                call, on_progress, is_aborted=lambda: call.request_id in self._aborted or is_aborted()
            )
        except Exception as error:
            shown = self._call_error(error)
            if shown is error:
                raise
            raise shown from error
        finally:
            self._aborted.clear()

    @override
    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    @override
    def require_alive(self) -> None:
        """There is nothing to ask: this process is the rank, and others are heard of in exchanges alone."""

    @override
    def broadcast(self, number: int) -> int:
        return gather_ints([number], self._mesh.world)[0][0]

    @property
    @override
    def can_start_again(self) -> bool:
        return False

    @override
    def survives(self, error: BaseException) -> bool:
        # run() raises these only where the ranks are in step. Others may have stopped anywhere, and another call could
        # hang; alone, only a device in error cannot go on.
        if isinstance(error, (*_SHARED, CallFailedError)):
            return True
        return self._mesh.world_size == 1 and not isinstance(error, RankFailedError)

    @override
    def end(self, patience_s: float = 0.0) -> None:
        # A joined process group stays: the program may use it elsewhere.
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _call_error(self, error: Exception) -> Exception:
        """What to raise for an error of the pipeline."""
        rank, size = self._mesh.rank, self._mesh.world_size
        failure = replace(as_message(error), exchanges=self._mesh.exchanges_so_far())
        in_step = are_in_step({0: failure}, 1) if size == 1 else self._all_failed_alike(failure)
        is_ours = isinstance(error, OmniSPError) if size == 1 else isinstance(error, _SHARED)
        if is_ours and in_step:
            return error
        return call_failed(dict.fromkeys(range(size), failure), size) if in_step else rank_failed(rank, size, failure)

    def _all_failed_alike(self, failure: Failed) -> bool:
        """Whether all ranks are in step after a failed call; every rank that has failed gets the same answer.

        They compare notes at the store where the program's ranks have met: others may wait in an exchange, which an
        exchange for this would disturb. Who has waited long enough decides for all, since the first verdict stands.
        """
        name, ranks = f"{self._failures}/{self._num_calls}", range(self._mesh.world_size)
        keys = [f"{name}/{rank}" for rank in ranks]
        verdict = b"apart"
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(keys[self._mesh.rank], pickle.dumps(failure))
            with suppress(dist.DistError):  # another rank has not failed in time
                store.wait(keys, timedelta(seconds=max(0.1, wait_after_failure_s(failure))))
                reports = {rank: pickle.loads(store.get(key)) for rank, key in zip(ranks, keys, strict=True)}
                verdict = b"in step" if are_in_step(reports, len(ranks)) else verdict
            return bool(store.compare_set(f"{name}/verdict", "", verdict.decode()) == b"in step")
        except Exception:  # the store is gone, and its rank with it
            return False

    def _require_same(self, call: Call) -> None:
        """Refuse calls that differ between ranks in seeds, names or values, pictures included, on all ranks alike."""
        message = (
            "ranks {ranks} were asked for something else than rank 0, by {name}: every rank of the program makes the "
            "same calls, with the same arguments, in the same order"
        )
        names = sorted(call.arguments)
        values: dict[str, Any] = {
            "the names of the arguments": names,
            "the seed": (call.seeds, call.check),
            "the scheduler": call.scheduler,
            "the LoRA adapters": call.adapters,
        }
        require_equal(self._mesh.world, message, **values)
        values = {f"the argument {name!r}": call.arguments[name] for name in names}
        require_equal(self._mesh.world, message, **values)
