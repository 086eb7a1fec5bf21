"""Whether the rows of a batch are computed apart, so that ranks may share them: by following them through the model.

The model's own code runs once on tensors whose rows lie on as many imagined ranks as there are rows. Whatever needs a
row of another rank would exchange it: then the rows are not apart, and the operation is the reason. So is code that
takes rows out of the batch, since it would find others there in a batch of fewer rows. What code makes of the number of
rows cannot be followed: a trial with fewer of them has to give the same numbers (`BatchRows.are_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from omni_sp.mesh import Axis, ParallelMesh
from omni_sp.sharding.attention_backend import tracking_flex_attention
from omni_sp.sharding.compiled import is_any_compiled
from omni_sp.sharding.forward_context import ShardedForward, activate
from omni_sp.sharding.replay.state import attribute_owners
from omni_sp.sharding.tracked import Placement, TokenTensor, even_placement
from omni_sp.sharding.tracked.recording import activate_recording
from omni_sp.sharding.tracked.row_rules import held_by

_NEEDS_ALL = "needs all rows of a batch"
_LEAST_LIMIT = 3e-4
"""In float32 models amplify roundings by more than the number of bits tells: some in the zoo to 5e-5."""


@dataclass(frozen=True)
class Item:
    """A tensor that is one row, of a batch that is a list."""

    row: int


_LEFT_OUT = object()


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch in the arguments and the results of a call.

    Attributes:
        count: how many rows there are.
        inputs: for each leaf of the arguments the dim of its rows, or the row that it is; None where all rows share it.
        outputs: for each tensor of the results the dim of its rows, or the row that it is.
    """

    count: int
    inputs: tuple[int | Item | None, ...]
    outputs: tuple[int | Item, ...] = ()

    def take(self, args: Any, kwargs: Any, start: int, stop: int) -> tuple[Any, Any]:
        """The arguments of some rows, which are views."""
        leaves, spec = tree_flatten((args, kwargs))
        taken = [_taken(x, place, start, stop) for x, place in zip(leaves, self.inputs, strict=True)]
        args, kwargs = _unflattened(taken, spec)
        return _without_left_out(args), _without_left_out(kwargs)

    def are_rows(self, part: Sequence[torch.Tensor], results: Sequence[torch.Tensor], start: int, stop: int) -> bool:
        """Whether what a call of some rows gave is, but for rounding, what a call of all gave for them."""
        taken = [_taken(x, place, start, stop) for x, place in zip(results, self.outputs, strict=True)]
        rows = [x for x in taken if x is not _LEFT_OUT]
        if [(x.shape, x.dtype) for x in part] != [(x.shape, x.dtype) for x in rows]:
            return False
        return all(map(_are_close, part, rows))


def _taken(x: Any, place: int | Item | None, start: int, stop: int) -> Any:
    if isinstance(place, Item):
        return x if start <= place.row < stop else _LEFT_OUT
    return x if place is None else x.narrow(place, start, stop - start)


def _without_left_out(tree: Any) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)(_without_left_out(x) for x in tree if x is not _LEFT_OUT)
    return {name: _without_left_out(x) for name, x in tree.items()} if type(tree) is dict else tree


def _are_close(some: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than a batch of another size rounds.

    That is measured for each vector of the last dim, so that one wrong token among thousands counts, and for all
    together, where rounding leaves less. The limits are a few roundings of the dtype: what passes them is no farther
    from the other batch's numbers than the dtype itself puts those from exact ones.
    """
    if not some.is_floating_point() or not some.numel():
        return torch.equal(some, others)
    if not torch.equal(some.isfinite(), others.isfinite()):
        return False
    a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (some, others))
    limit = max(8 * torch.finfo(some.dtype).eps, _LEAST_LIMIT)
    all_errors, all_sizes = (a - b).square().mean().sqrt(), b.square().mean().sqrt()
    errors, sizes = (a - b).square().mean(-1).sqrt(), b.square().mean(-1).sqrt()
    return bool(all_errors <= limit / 2 * all_sizes) and bool((errors <= limit * sizes.clamp(min=all_sizes)).all())


def find_rows(args: Any, kwargs: Any) -> list[BatchRows] | str:
    """Where a call's arguments may have the rows of a batch, by their sizes: guesses, of which `prove_rows` proves one.

    Args:
        args: of a transformer's forward.
        kwargs: of it.

    Returns:
        The best guess first; none where there is one row or no batch. Why there can be none.
    """
    # The first value with more than a number for each row is what is denoised.
    values = [*args, *kwargs.values()]
    denoised = next((x for x in values if isinstance(x, (list, tuple, dict)) or _num_dims(x) > 1), ())
    is_list = not isinstance(denoised, torch.Tensor)
    if is_list and not all(isinstance(x, torch.Tensor) and x.ndim > 1 for x in denoised):
        return "a batch comes as lists in a list"
    count = len(denoised)
    if count < 2:
        return []
    guess = [place for value in values for place in _places_in(value, count, is_list)]
    # Some models take the positions of the first row for all rows.
    names = [name for name, value in kwargs.items() for _ in tree_flatten(value)[0]]
    are_positions = [False] * (len(guess) - len(names)) + ["ids" in name.split("_") for name in names]
    of_all = [None if positions else dim for dim, positions in zip(guess, are_positions, strict=True)]
    return [BatchRows(count, tuple(one)) for one in ([guess] if of_all == guess else [guess, of_all])]


def _num_dims(x: Any) -> int:
    return x.ndim if isinstance(x, torch.Tensor) else 0


def _places_in(value: Any, count: int, is_list: bool) -> list[int | Item | None]:
    """A guess for each leaf of an argument."""
    leaves = tree_flatten(value)[0]
    if is_list and isinstance(value, list) and len(value) == len(leaves) == count and all(map(_num_dims, leaves)):
        return [Item(row) for row in range(count)]
    return [_dim_of(x, count) for x in leaves]


def _dim_of(x: Any, count: int) -> int | None:
    if not isinstance(x, torch.Tensor):
        return None
    # Texts of several layers come layer by layer, each with all rows.
    return next((dim for dim, size in enumerate(x.shape[: 2 if x.ndim > 2 else 1]) if size == count), None)


def prove_rows(
    model: torch.nn.Module, mesh: ParallelMesh, args: Any, kwargs: Any, results: Sequence[torch.Tensor]
) -> BatchRows | str | None:
    """Follow the rows of a batch through a model. Nothing is exchanged, and the model is left as it was.

    Every rank does the same on the same inputs: it computes the first row, of all tokens.

    Args:
        model: a transformer.
        mesh: the ranks.
        args: of its forward.
        kwargs: of its forward.
        results: the tensors that the call returns.

    Returns:
        Where the rows are; the reason why they are not computed apart; None where there is no batch.
    """
    guesses = find_rows(args, kwargs)
    if isinstance(guesses, str):
        return guesses
    reasons = []
    for rows in guesses:
        found = _followed_through(model, mesh, rows, args, kwargs, results)
        if isinstance(found, BatchRows):
            return found
        reasons.append(found)
    return reasons[0] if reasons else None


def _followed_through(
    model: torch.nn.Module, mesh: ParallelMesh, rows: BatchRows, args: Any, kwargs: Any, results: Sequence[torch.Tensor]
) -> BatchRows | str:
    """The rows with their places in the results, or why they are not computed apart."""
    placement = even_placement(rows.count, rows.count)
    axis = Axis("rows", tuple(range(rows.count)), 0, None, {})
    leaves, spec = tree_flatten((args, kwargs))
    followed = [_followed(x, place, placement, axis) for x, place in zip(leaves, rows.inputs, strict=True)]
    args, kwargs = _unflattened(followed, spec)
    try:
        with _following(model, mesh, rows, sorted({x.device.index for x in results if x.is_cuda})):
            found = [x for x in tree_flatten(model.forward(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
    except _RowsDependError as reason:
        return str(reason)
    except Exception as error:  # such as a kernel that takes no such tensors
        return f"the rows of a batch cannot be followed: {type(error).__name__}"
    if [x.shape for x in found] != [x.shape for x in results]:
        return "the rows of a batch cannot be followed: the results have other shapes"
    places = [_place_of(x, placement) for x in found]
    if None in places:
        return f"a result {_NEEDS_ALL}"
    return replace(rows, outputs=tuple(place for place in places if place is not None))


def _followed(x: Any, place: int | Item | None, placement: Placement, axis: Axis) -> Any:
    """A leaf of the arguments, of which the first of the imagined ranks has its row."""
    if place is None:
        return x
    if not isinstance(place, Item):
        return TokenTensor(x.narrow(place, 0, 1).clone(), place, placement, axis)
    dim = max(x.ndim - 2, 0)  # models work on the last one
    held = held_by(place.row, x.shape[dim], axis)
    return TokenTensor(x.narrow(dim, 0, held.lengths[0]).clone(), dim, held, axis)


def _place_of(x: torch.Tensor, placement: Placement) -> int | Item | None:
    """The rows in a result; None where it is not made of rows alone."""
    if not isinstance(x, TokenTensor):
        return None
    holders = [row for row, length in enumerate(x.placement.lengths) if length]
    return x.shard_dim if x.placement == placement else Item(holders[0]) if len(holders) == 1 else None


def _unflattened(leaves: list[Any], spec: TreeSpec) -> tuple[Any, Any]:
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


class _RowsDependError(Exception):
    """The rows of a batch are not computed apart; the text says why."""


class _NoExchange:
    """A recording that refuses what would cross from one row to another."""

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """Refuse an exchange; a gather names the operation that it is for."""
        names = [x for x in (*args, *kwargs.values()) if isinstance(x, str)]
        raise _RowsDependError(f"{names[-1] if names else function.__name__} {_NEEDS_ALL}")

    def will_read(self, _tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Nothing is replayed."""
        return None


class _RowsStayWhole(TorchDispatchMode):
    """Sees that every followed tensor has all rows of the batch, each as often as the others, in their order."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows, self._known = placement, {placement}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, TokenTensor) and not self._has_all(x.placement):
                raise _RowsDependError(f"{func} takes rows out of a batch")
        return result

    def _has_all(self, placement: Placement) -> bool:
        """Whether a dim is made of all rows: they are flattened with what lies before and behind them."""
        if placement not in self._known:
            times, rest = divmod(placement.size, self._rows.size)
            inner = placement.ranges_per_rank[0][0][1] if placement.ranges_per_rank[0] else 0
            if rest or not times or not inner or times % inner:
                return False
            if self._rows.flatten_dims(times // inner, inner) != placement:
                return False
            self._known.add(placement)
        return True


@contextmanager
def _following(model: torch.nn.Module, mesh: ParallelMesh, rows: BatchRows, devices: Sequence[int]) -> Iterator[None]:
    """While this lasts, the model takes followed rows: its tokens are not split, no block is replayed or compiled."""
    forward = ShardedForward(mesh, None, {}, {}, splits_tokens=False)
    with ExitStack() as stack:
        stack.enter_context(_attributes_kept(model))
        stack.enter_context(torch.random.fork_rng(devices))
        if is_any_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(activate(forward))
        stack.enter_context(tracking_flex_attention())
        stack.enter_context(activate_recording(_NoExchange()))
        if not any(isinstance(place, Item) for place in rows.inputs):  # the rows of a list are taken one by one
            stack.enter_context(_RowsStayWhole(even_placement(rows.count, rows.count)))
        yield


@contextmanager
def _attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Undo what code keeps in a model's attributes, which may be tensors that belong to no rank."""
    attributes = [vars(owner) for owner in attribute_owners(list(model.modules()))]
    held = [x for owned in attributes for x in owned.values() if type(x) in (dict, list)]
    before = [(x, x.copy()) for x in (*attributes, *held)]
    try:
        yield
    finally:
        for now, copy in before:
            if type(now) is dict:
                now.clear()
                now.update(copy)
            else:
                now[:] = copy
