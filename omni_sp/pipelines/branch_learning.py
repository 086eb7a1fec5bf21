"""What the first call of its shapes tells: what it returns, and whether a group may make it, or some rows, for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.collectives import gather_ints
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.branch_results import Shape
from omni_sp.sharding.batch_rows import BatchRows, prove_rows

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
"""What a call may get beside tensors: nothing can be kept in it."""


def key_of(args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the shapes of a call's results follow from. Numbers with a point are no sizes."""
    leaves, spec = tree_flatten((args, kwargs))
    described = tuple(Shape.of(x) if isinstance(x, torch.Tensor) else _value(x) for x in leaves)
    return described, spec, *autocast_modes()


def autocast_modes() -> tuple[bool, bool]:
    """Whether autocast is enabled on this rank, for CUDA and for the CPU."""
    return torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")


def _value(x: Any) -> Any:
    return type(x) if isinstance(x, (float, complex)) else (type(x), x)


def reason_against(leaves: Sequence[Any], given: Sequence[Any], before: Sequence[Any], is_same: bool) -> str | None:
    """Why the results of a call, and what it did to its arguments, forbid that another group makes it."""
    if not all(isinstance(x, PLAIN) or type(x) is torch.Tensor for x in leaves):
        return "a call returns an object"
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if not tensors or len({x.device for x in tensors}) > 1 or any(x.layout != torch.strided for x in tensors):
        return "a call returns no tensors on one device"
    arguments = [x for x in given if isinstance(x, torch.Tensor)]
    memory = {x.untyped_storage().data_ptr() for x in arguments if x.numel()}
    if any(x.untyped_storage().data_ptr() in memory for x in tensors if x.numel()):
        return "a call returns an argument"
    copies = [x for x in before if isinstance(x, torch.Tensor)]
    if not is_same or not all(map(torch.equal, arguments, copies)):
        return "a call writes to an argument"
    return None


def rows_of(
    model: torch.nn.Module,
    mesh: ParallelMesh,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    results: Sequence[torch.Tensor],
) -> BatchRows | str | None:
    """Where the rows of a call's batch are, if groups may share them. A collective call where there is a batch.

    Args:
        model: a transformer.
        mesh: the ranks.
        run: makes a call of it.
        args: of the call.
        kwargs: of the call.
        results: the tensors that it returned.

    Returns:
        The rows; the reason why they are not shared; None where there is no batch.
    """
    found = prove_rows(model, mesh, args, kwargs, results)
    if found is None:  # by shapes, which are the same on all ranks
        return None
    if not _are_all(isinstance(found, BatchRows), mesh) or isinstance(found, str):
        return found if isinstance(found, str) else "another rank cannot follow the rows of a batch"
    # Code that looks at the size of the batch follows other rules for less of it: the numbers have to be the same too.
    share = even_shares(found.count, mesh.cfg.size)[mesh.cfg.rank]
    is_close = True
    if share[0] < share[1]:
        taken, named = found.take(args, kwargs, *share)
        try:
            part = [x for x in tree_flatten(run(*taken, **named))[0] if isinstance(x, torch.Tensor)]
            is_close = found.are_rows(part, results, *share)
        except Exception:  # such as a size that does not fit the others
            is_close = False
    return found if _are_all(is_close, mesh) else "a row of a batch is another one in a batch of another size"


def even_shares(count: int, num_groups: int) -> list[tuple[int, int]]:
    """The first row of each group, and the one behind its last."""
    bounds = [-(-count * group // num_groups) for group in range(num_groups + 1)]
    return list(pairwise(bounds))


def _are_all(flag: bool, mesh: ParallelMesh) -> bool:
    return all(value for (value,) in gather_ints([int(flag)], mesh.world))
