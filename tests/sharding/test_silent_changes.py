"""What somebody changes between two calls without a word: a block that was replayed gives what one process gives."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_sp import ParallelMesh, parallelize
from omni_sp.sharding import BlockCounts, Plan, Split, foreign_code
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.changeable import Model, changes

PLAN = Plan({"blocks.0": {"x": Split(dim=1)}})
NOT_REPLAYED = ("tensor", "by numpy")


def note_blocks(handle: Any, counts: list[BlockCounts]) -> None:
    counts.append(copy.deepcopy(handle.blocks))


def changed(mesh: ParallelMesh, names: list[str]) -> dict[str, tuple[float, float, BlockCounts]]:
    """Of each change the error after it and after it is undone, its effect, and how blocks ran before it."""
    warnings.simplefilter("ignore")
    foreign_code.KNOWN_PACKAGES.add("tests")
    x, found = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0)), {}
    for name in names:
        uses, change = changes()[name]

        def outputs(model: Any, between: Callable[[], None], uses: str = uses, change: Any = change) -> list[Tensor]:
            made = [model(x, None, uses) for _ in range(2)]
            between()
            undo = change(model)
            try:
                made.append(model(x, None, uses))
            finally:
                if undo is not None:
                    undo()
            return [*made, model(x, None, uses)] if undo is not None else made

        with torch.no_grad():
            wanted = outputs(randomise(Model()).eval(), lambda: None)
            model = randomise(Model()).eval()
            handle = parallelize(model, mesh, plan=PLAN)
            counts: list[BlockCounts] = []
            got = outputs(model, partial(note_blocks, handle, counts))
            handle.remove()
        error = max(relative_error(one, other) for one, other in zip(got, wanted, strict=True))
        found[name] = error, relative_error(wanted[1], wanted[2]), counts[0]
    foreign_code.KNOWN_PACKAGES.discard("tests")
    return found


def test_a_change_is_seen_at_the_next_call(ranks: RankPool) -> None:
    for found in ranks.run(changed, [*changes()], ulysses=2):
        for name, (error, effect, counts) in found.items():
            assert effect > 1e-3, name
            assert error <= 1e-5, (name, counts)
            assert counts.replayed or name.startswith(NOT_REPLAYED), (name, counts)


def list_kept(calls: int) -> list[Any]:
    return [[]] * calls


def dict_made_anew(calls: int) -> list[Any]:
    return [{"factor": 2.0} if number else {} for number in range(calls)]


def mask_by_numpy(calls: int) -> list[Any]:
    return [torch.ones(3, dtype=torch.bool)] * calls


def places(calls: int) -> list[Any]:
    return list(torch.arange(8.0 * calls).split(8))


def conjugated(calls: int) -> list[Any]:
    x = torch.complex(torch.arange(8.0), torch.ones(8))
    return [x.conj() if number % 2 else x for number in range(calls)]


def nothing(calls: int) -> list[Any]:
    return [None] * calls


ARGUMENTS: dict[str, Callable[[int], list[Any]]] = {
    "a list": list_kept,
    "a dict": dict_made_anew,
    "a mask": mask_by_numpy,
    "a place in memory": places,
    "a complex tensor": conjugated,
    "python's random numbers": nothing,
    "numpy's random numbers": nothing,
}


def called_with(mesh: ParallelMesh) -> dict[str, tuple[list[float], BlockCounts]]:
    """Errors of calls whose arguments, or random numbers, differ in what no shape says."""
    foreign_code.KNOWN_PACKAGES.add("tests")
    x, found = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0)), {}

    def outputs(model: Any, uses: str, others: list[Any]) -> list[Tensor]:
        random.seed(0)
        np.random.seed(0)
        made = []
        for number, other in enumerate(others):
            if uses == "a mask":
                other.numpy()[0] = number % 2 == 0
            made.append(model(x, other, uses))
        return made

    with torch.no_grad():
        for uses, arguments in ARGUMENTS.items():
            model = randomise(Model()).eval()
            wanted = outputs(model, uses, arguments(4))
            handle = parallelize(model, mesh, plan=PLAN)
            got = outputs(model, uses, arguments(4))
            found[uses] = [relative_error(*pair) for pair in zip(got, wanted, strict=True)], handle.blocks
            handle.remove()
    foreign_code.KNOWN_PACKAGES.discard("tests")
    return found


def test_what_no_shape_says_is_seen(ranks: RankPool) -> None:
    for found in ranks.run(called_with, ulysses=2):
        for uses, (errors, counts) in found.items():
            assert max(errors) <= 1e-5, (uses, errors, counts)
            # The first block takes out of the dict what the second one then does not find, and so does not change.
            assert bool(counts.replayed) == (uses in ("a mask", "a complex tensor", "a dict")), (uses, counts)
            assert bool(counts.followed) == (uses not in ("a mask", "a complex tensor")), (uses, counts)
