"""A rank of somebody else's program: ranks agree on what they draw, or all of them refuse."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from PIL import Image

from omni_sp.engine.engine import Engine
from omni_sp.engine.messages import Call, Done, Ready
from omni_sp.engine.pipeline_runner import any_rank
from omni_sp.engine.ranks.local import LocalRank
from omni_sp.engine.startup import Startup
from omni_sp.errors import EngineClosedError, RankFailedError, RequestAbortedError, SamplingParamsError, ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.testing.ranks import RankPool


class FakeRunner:
    """Runs nothing; refuses the calls that ask for it, and raises on the ranks that the call names."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def run(self, call: Call, on_step: Any, *, is_aborted: Any) -> Done:
        if "refuse" in call.arguments:
            raise SamplingParamsError("not this")
        if self._mesh.rank in call.arguments.get("raise", ()):
            if self._mesh.rank in call.arguments.get("after exchanges", ()):
                self._mesh.world.traffic.add("gather", 0)
            raise IndexError("out of range")
        if call.can_be_aborted and any_rank(is_aborted(), self._mesh):
            raise RequestAbortedError("aborted")
        return Done(request_id=call.request_id, result=None, tokens={})

    def close(self) -> None:
        """Fail after a failure, as a device in error does: the caller still learns of the first one."""
        if sys.exc_info()[0] is not None:
            raise RuntimeError("the device is in error")


class JoinedRanks(LocalRank):
    """Ranks that are there already, without a model."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._aborted: set[str] = set()
        self._use(mesh)
        vars(self).update(_runner=FakeRunner(mesh))

    def start(self, startup: Startup, is_cancelled: Any) -> Ready:
        return Ready(
            rank=0, ranks=1, layout="", capabilities=PipelineCapabilities(name="Fake", parameters={}), device="cpu",
            dtype="float32", load_s=0.0,
        )  # fmt: skip


def joined(mesh: ParallelMesh) -> Engine:
    """An engine on ranks that are there already, without a model."""
    return Engine(JoinedRanks(mesh), Startup(lambda news: None))


def run_case(mesh: ParallelMesh, odd_rank: int, name: str) -> str:
    """What happens when one rank's seed is not the others'."""
    engine = joined(mesh)
    call = Call(request_id="request-0", arguments={name: 1}, seeds=(int(mesh.rank == odd_rank),))
    try:
        engine.run(call, None)
    except (ShardingError, SamplingParamsError) as error:
        first = f"{type(error).__name__}: {error}"
    else:
        return "ran"
    try:
        engine.run(call, None)
    except EngineClosedError:
        return f"{first}; closed"
    except SamplingParamsError:
        return f"{first}; open"
    return "ran at the second try"


def failures_case(mesh: ParallelMesh, arguments: dict[str, Any]) -> str:
    """What becomes of a call, and whether the next one works."""
    engine = joined(mesh)
    try:
        engine.run(Call(request_id="request-0", arguments=arguments, seeds=(0,)), None)
    except (RankFailedError, RequestAbortedError) as error:
        first = f"{type(error).__name__}: {error}"
    else:
        return "ran"
    mesh.world.traffic.reset()  # the pool's meshes serve other cases too
    if engine.is_open:
        engine.run(Call(request_id="request-1", arguments={}, seeds=(0,)), None)
    return f"{first} ({'open' if engine.is_open else 'closed'})"


def interrupted_case(mesh: ParallelMesh) -> str:
    """One rank is interrupted; all leave the call."""
    engine = joined(mesh)
    call = Call(request_id="request-0", arguments={}, seeds=(0,), can_be_aborted=True)
    try:
        engine.run(call, None, lambda: mesh.rank == 1)
    except RequestAbortedError as error:
        engine.run(call, None)
        return f"{error}, open"
    return "ran"


def seeds_case(mesh: ParallelMesh) -> list[int]:
    engine = joined(mesh)
    return [engine.new_seed() for _ in range(3)]


def test_all_ranks_refuse_when_one_asks_for_something_else(ranks: RankPool) -> None:
    told = ranks.run(run_case, 3, "width", ulysses=2, ring=2)
    assert len(set(told)) == 1
    assert told[0].startswith("ShardingError: ranks [3] were asked for something else than rank 0")
    assert told[0].endswith("; closed")


def run_odd_value(mesh: ParallelMesh, name: str) -> str:
    """What happens when one rank's argument is not the others'."""
    picture = Image.new("RGB", (4, 4), (0, 0, 9 * mesh.rank))
    odd: dict[str, Any] = {
        "image": picture,
        "latents": torch.full((2, 3), float(mesh.rank)),
        "sigmas": [1.0, {"a": mesh.rank}],
    }
    arguments = {"prompt": "a"} | ({name: odd[name]} if name in odd else {})
    adapters = (("style", float(mesh.rank)),) if name == "adapters" else ()
    call = Call(request_id="request-0", arguments=arguments, seeds=(0,), adapters=adapters)
    try:
        joined(mesh).run(call, None)
    except ShardingError as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize("name", ["image", "latents", "sigmas"])
def test_pictures_tensors_and_lists_are_compared(ranks: RankPool, name: str) -> None:
    for message in ranks.run(run_odd_value, name, ulysses=2):
        assert message.startswith(f"ranks [1] were asked for something else than rank 0, by the argument '{name}'")


def test_adapters_are_compared(ranks: RankPool) -> None:
    for message in ranks.run(run_odd_value, "adapters", ulysses=2):
        assert message.startswith("ranks [1] were asked for something else than rank 0, by the LoRA adapters")


def test_all_ranks_run_when_they_ask_for_the_same(ranks: RankPool) -> None:
    assert ranks.run(run_case, -1, "width", ulysses=2, ring=2) == ["ran"] * 4


def test_a_refusal_leaves_joined_ranks_open(ranks: RankPool) -> None:
    assert ranks.run(run_case, -1, "refuse", ulysses=2, ring=1) == ["SamplingParamsError: not this; open"] * 2


def test_joined_ranks_that_raise_alike_go_on(ranks: RankPool) -> None:
    told = ranks.run(failures_case, {"raise": [0, 1]}, ulysses=2)
    assert told == ["CallFailedError: all 2 ranks raised IndexError: out of range; the model stays loaded (open)"] * 2


def test_joined_ranks_that_raise_apart_are_closed_within_a_bound(ranks: RankPool) -> None:
    told = ranks.run(failures_case, {"raise": [1]}, ulysses=2)
    assert told == ["ran", "RankFailedError: rank 1 of 2 raised IndexError: out of range (closed)"]
    told = ranks.run(failures_case, {"raise": [0, 1], "after exchanges": [1]}, ulysses=2)
    assert told == [f"RankFailedError: rank {rank} of 2 raised IndexError: out of range (closed)" for rank in (0, 1)]


def test_joined_ranks_leave_a_call_together(ranks: RankPool) -> None:
    assert ranks.run(interrupted_case, ulysses=2) == ["aborted, open"] * 2


def test_fresh_seeds_are_rank_0s(ranks: RankPool) -> None:
    seeds = ranks.run(seeds_case, ulysses=2, ring=2)
    assert all(row == seeds[0] for row in seeds)
    assert len(set(seeds[0])) == 3
