"""A rank of somebody else's program: ranks agree on what they draw, or all of them refuse."""

from __future__ import annotations

import sys
from typing import Any

from omni_sp.engine.engine import Engine
from omni_sp.engine.messages import Call, Done, Ready
from omni_sp.engine.ranks.local import LocalRank
from omni_sp.engine.startup import Startup
from omni_sp.errors import EngineClosedError, SamplingParamsError, ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.capabilities import PipelineCapabilities
from testing.ranks import RankPool


class FakeRunner:
    """Runs nothing; refuses the calls that ask for it."""

    def run(self, call: Call, on_step: Any, **_: Any) -> Done:
        if "refuse" in call.arguments:
            raise SamplingParamsError("not this")
        return Done(request_id=call.request_id, result=None, tokens={})

    def close(self) -> None:
        """Fail after a failure, as a device in error does: the caller still learns of the first one."""
        if sys.exc_info()[0] is not None:
            raise RuntimeError("the device is in error")


class JoinedRanks(LocalRank):
    """Ranks that are there already, without a model."""

    def __init__(self, mesh: ParallelMesh) -> None:
        vars(self).update(_mesh=mesh, _runner=FakeRunner(), _aborted=set())

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


def seeds_case(mesh: ParallelMesh) -> list[int]:
    engine = joined(mesh)
    return [engine.new_seed() for _ in range(3)]


def test_all_ranks_refuse_when_one_asks_for_something_else(ranks: RankPool) -> None:
    told = ranks.run(run_case, 3, "width", ulysses=2, ring=2)
    assert len(set(told)) == 1
    assert told[0].startswith("ShardingError: ranks [3] were asked for something else than rank 0")
    assert told[0].endswith("; closed")


def test_all_ranks_run_when_they_ask_for_the_same(ranks: RankPool) -> None:
    assert ranks.run(run_case, -1, "width", ulysses=2, ring=2) == ["ran"] * 4


def test_a_refusal_leaves_joined_ranks_open(ranks: RankPool) -> None:
    assert ranks.run(run_case, -1, "refuse", ulysses=2, ring=1) == ["SamplingParamsError: not this; open"] * 2


def test_fresh_seeds_are_rank_0s(ranks: RankPool) -> None:
    seeds = ranks.run(seeds_case, ulysses=2, ring=2)
    assert all(row == seeds[0] for row in seeds)
    assert len(set(seeds[0])) == 3
