"""A call that one rank alone leaves: the others end soon, by an error that names it, and do not wait for it in vain."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import build, draw

QWEN = "QwenImagePipeline"
Ending = tuple[str, str, float]


def left_by_one(mesh: ParallelMesh, rank: int, error: type[BaseException], last: bool) -> list[Ending]:
    """How two calls end, of which one rank leaves the first after a step; on a mesh of their own, which they spoil."""
    pipe, own = build(QWEN, torch.float32), ParallelMesh(mesh.config, ranks=mesh.ranks)
    handle = parallelize(pipe, own)
    endings = []

    def callback(_pipe: Any, step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if mesh.rank == rank and step == (2 if last else 0):
            raise error("of the user's own")
        return given

    for more in ({"callback_on_step_end": callback}, {}):
        began = time.monotonic()
        try:
            draw(pipe, ENTRIES[QWEN].arguments() | more)
            endings.append(("", "", 0.0))
        except BaseException as raised:
            endings.append((type(raised).__name__, str(raised), time.monotonic() - began))
    handle.remove()
    assert "progress_bar" not in vars(pipe)
    return endings


def test_others_end_soon_by_an_error_that_names_the_rank(ranks: RankPool) -> None:
    for rank, (first, second) in enumerate(ranks.run(left_by_one, 2, KeyboardInterrupt, False, ulysses=2, ring=2)):
        if rank == 2:
            assert first[:2] == ("KeyboardInterrupt", "of the user's own")
        else:  # the neighbour of one that waits for rank 2 may wait for that one
            assert first[0] == "ShardingError"
            assert re.search(r"rank 2 has left .*, KeyboardInterrupt|rank \d has left .*, ShardingError", first[1])
        assert second[0] == "ShardingError"  # and not a picture, nor silence
        assert max(first[2], second[2]) < 20


def left_by_all(mesh: ParallelMesh) -> bool:
    """Whether the next picture is right after all ranks left a call alike, at every step of it."""
    pipe, arguments = build(QWEN, torch.float32), ENTRIES[QWEN].arguments()
    handle = parallelize(pipe, mesh)
    expected, right = draw(pipe, arguments), True
    for last in range(3):

        def callback(_pipe: Any, step: int, _time: Any, given: dict[str, Any], last: int = last) -> dict[str, Any]:
            if step == last:
                raise ValueError("of the user's own")
            return given

        try:
            draw(pipe, arguments | {"callback_on_step_end": callback})
        except ValueError:
            right &= torch.equal(draw(pipe, arguments), expected)
        else:
            right = False
    handle.remove()
    return right


def test_ranks_that_leave_alike_go_on(ranks: RankPool) -> None:
    assert all(ranks.run(left_by_all, ulysses=2))


def test_one_that_is_left_after_its_last_step_ends_too(ranks: RankPool) -> None:
    [(other, _), (own, _)] = ranks.run(left_by_one, 1, ValueError, True, ulysses=2)
    assert own[0] == "ValueError"
    assert other[2] < 20
