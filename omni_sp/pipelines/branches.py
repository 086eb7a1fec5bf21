"""The transformer calls of a denoising step, shared among the groups of a mesh's cfg axis.

With guidance a pipeline calls its transformer once for each branch. A call runs at once, on the group whose turn it is.
The other groups skip it and get lazy tensors; when every group had its turn, or somebody needs a number, all results
cross in one exchange. So nothing of the model is moved in time: its modules, hooks and contexts are, when a call runs,
what they are in one process. Where the branches, or several prompts, are rows of one batch, each group computes its
rows of the call, if following the rows through the model has shown that they are computed apart.

Ranks cannot part: all run the same program on the same shapes, so all count the same calls, and whether a call is
shared follows from what all of them see, or from one exchange at the first call of its shape, which all compute. What
one rank alone may have, such as a hook, is compared where a call of the pipeline begins, and where a round does.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.collectives import gather_ints, gather_texts
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.branch_learning import PLAIN, autocast_modes, key_of, reason_against, rows_of
from omni_sp.pipelines.branch_results import BranchCounts, Output, Result, Shape, exchange_results
from omni_sp.pipelines.pipeline_calls import PipelineWatch
from omni_sp.sharding.apply import release_weights
from omni_sp.sharding.batch_rows import BatchRows
from omni_sp.sharding.call_state import CallState, call_state, changes_while
from omni_sp.sharding.lazy import LazyRound, full_tensors
from omni_sp.sharding.same_call import CallToken, SameCallCheck, Surroundings

_ATTEMPTS = 3


class Branches:
    """Shares the calls of a pipeline's transformers until ``remove()`` is called.

    Args:
        pipe: a pipeline.
        models: its transformers. They share one count of turns, since a step may call several.
        mesh: the ranks, with more than one group on the cfg axis.
        call_token: as of `SameCallCheck`.
        surroundings: as of `SameCallCheck`.

    Attributes:
        counts: since ``reset_counts()``.
    """

    def __init__(
        self,
        pipe: Any,
        models: Sequence[torch.nn.Module],
        mesh: ParallelMesh,
        call_token: CallToken,
        surroundings: Surroundings,
    ) -> None:
        self._mesh, self._axis, self._call_token = mesh, mesh.cfg, call_token
        self.counts = BranchCounts()
        self._token: object = None
        self._begin_round()
        self._models = list(models)
        self._modules: list[Any] = []
        self._changes: dict[int, tuple[tuple[Any, ...], int]] = {}
        self._calls = self._calls_per_step = 0
        self._known: dict[Any, Output | str] = {}
        self._attempts: Counter[Any] = Counter()
        self._owners: dict[tuple[int, str], int] = {}
        self._undo: list[Callable[[], None]] = []
        # Of all ranks, not of those in one place of their groups: these would raise, and the others wait for them.
        check = functools.partial(SameCallCheck, axis=mesh.world, always=mesh.check, call_token=call_token)
        is_whole = mesh.weights.size == 1
        for index, model in enumerate(models):
            self._attach(model, index, check(model, surroundings=surroundings, with_blocks=is_whole))
        self._watch = PipelineWatch(pipe, self._end_step, lambda: self.complete("the end of the pipeline"))

    def reset_counts(self) -> None:
        """Begin anew to count."""
        self.counts = BranchCounts()

    def complete(self, reason: str) -> None:
        """Exchange what is still to be exchanged, after which no lazy tensor needs other ranks. A collective call."""
        if self._results:
            self._round.complete(reason)

    def drop(self) -> None:
        """Forget what is still to be exchanged, because the call that it belongs to was left."""
        self._results.clear()
        self._begin_round()

    def _begin_round(self) -> None:
        self._results: list[Result] = []
        self._round = LazyRound(functools.partial(self._exchange, self._results))

    def remove(self) -> None:
        """Restore the models and the schedulers. A second call does nothing."""
        self._watch.remove()
        while self._undo:
            self._undo.pop()()

    def _attach(self, model: torch.nn.Module, index: int, check: SameCallCheck) -> None:
        """Take the model's calls, in the place that torch has for a compiled call: a skipped call runs no hook."""
        call = _SharedCalls(self, model, index, check, vars(model).get("_compiled_call_impl"))
        model._compiled_call_impl = call

        def undo() -> None:
            if vars(model).get("_compiled_call_impl") is call:
                model._compiled_call_impl = call.compiled

        self._undo.append(undo)

    def _end_step(self) -> None:
        self.complete("the scheduler")
        if self._calls:
            self.counts.steps += 1
            self._calls, self._calls_per_step = 0, self._calls

    def call(
        self,
        model: torch.nn.Module,
        index: int,
        check: SameCallCheck,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call of a transformer, or skip it, where it is another group's turn."""
        token = self._call_token()
        if token is not self._token:
            self._token = token
            self._begin_call()
        self._calls += 1
        args, kwargs = full_tensors((args, kwargs), "the input of the next call")
        state, has_steps = call_state(model), self._watch.watch()
        if not self._results:  # the groups are in step, and wait for each other as little as between two rounds
            foreign = None if state.context else tuple(filter(None, [state.reason]))
            check.before_forward(args, kwargs, foreign, self._num_changes(index, state))
        reason = self._reason_for_all(state, args, kwargs) if has_steps else "the pipeline has no scheduler"
        if reason is not None:
            return self._computed_by_all(reason, run(*args, **kwargs))
        key = (index, *key_of(args, kwargs))
        output = self._known.get(key)
        if isinstance(output, str):
            return self._computed_by_all(output, run(*args, **kwargs))
        if output is None or output.modules != state.modules:
            return self._first_call(model, index, key, state, run, args, kwargs)
        lengths = self._lengths(output, index, state)
        if not lengths[self._axis.rank]:
            release_weights(model)
        return self._shared_call(output, lengths, run, args, kwargs)

    def _num_changes(self, index: int, state: CallState) -> int:
        """How often the modules of a model were found to be others than at its call before."""
        before, number = self._changes.get(index, (state.modules, 0))
        self._changes[index] = state.modules, number + (before != state.modules)
        return self._changes[index][1]

    def _begin_call(self) -> None:
        """Forget what an earlier call of the pipeline has left behind, and compare the ranks. A collective call.

        One that failed may have ended on some ranks before others learned something, and somebody may have replaced a
        module on one rank: then all learn it anew.

        Raises:
            ShardingError: other code runs around the transformers of one rank than around those of another.
        """
        self.drop()
        self._calls = 0
        states = [call_state(model) for model in self._models]
        before, self._modules = self._modules, [state.modules for state in states]
        found = [state.reason for state in states] + ["autocast is enabled" if any(autocast_modes()) else None]
        reasons = "; ".join(dict.fromkeys(filter(None, found)))
        learned = [self._calls_per_step, len(self._known), sum(self._attempts.values()), len(self._owners)]
        by_rank = gather_ints([zlib.crc32(reasons.encode()), int(self._modules != before), *learned], self._mesh.world)
        if len({reason for reason, *_ in by_rank}) > 1 and "fake" not in self._mesh.world.backends.values():
            texts = gather_texts(reasons or "nothing", self._mesh.world)
            shown = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
            raise ShardingError(
                f"the ranks cannot share their transformers' calls, since they have other code around them: {shown}. "
                "Every rank must put the same there, before the pipeline is called"
            )
        if len(set(by_rank)) > 1:
            self._calls_per_step = 0
            for one in (self._known, self._attempts, self._owners):
                one.clear()

    def _reason_for_all(self, state: CallState, args: Any, kwargs: Any) -> str | None:
        """Why every group has to compute a call; None where one can for all."""
        if state.reason is not None:
            return state.reason
        for leaf in tree_flatten((args, kwargs))[0]:
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                return f"a call gets an object that it may write to, {type(leaf).__name__}"
        return None

    def _computed_by_all(self, reason: str, output: Any) -> Any:
        self.counts.units += 1
        self.counts.rounds += 1
        self.counts.reasons[reason] += 1
        return output

    def _lengths(self, output: Output, index: int, state: CallState) -> list[int]:
        """How many rows of a call each group computes; of one that is computed whole, 1 for its group.

        That is who keeps its context, or those that had the fewest turns of this round.
        """
        lengths, size = [0] * self._axis.size, self._axis.size
        if state.context is not None:
            same_model = sum(1 for of_model, _ in self._owners if of_model == index)
            lengths[self._owners.setdefault((index, state.context), same_model % size)] = 1
            return lengths
        turns = [sum(result.lengths[group] for result in self._results) for group in range(size)]
        # Where a step's calls are one for each group, none needs to be shared, and the bits are those of one process.
        # That may hold for the first step too, of which nobody knows yet.
        fills_rounds = self._calls_per_step % size == 0
        is_shared = isinstance(output.rows, BatchRows) and not fills_rounds
        for _ in range(output.rows.count if isinstance(output.rows, BatchRows) and is_shared else 1):
            lengths[min(range(size), key=lambda group: (turns[group] + lengths[group], group))] += 1
        return lengths

    def _first_call(
        self,
        model: torch.nn.Module,
        index: int,
        key: Any,
        state: CallState,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of new shapes: every group computes it, and sees whether one may for all."""
        self.complete("a call of new shapes")
        given = tree_flatten((args, kwargs))[0]
        structure = tree_flatten((args, kwargs))[1]
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        result, changes = self._run_on_all(model, lambda: run(*args, **kwargs))
        leaves, spec = tree_flatten(result)
        reason = reason_against(leaves, given, before, structure == tree_flatten((args, kwargs))[1])
        if reason is None and changes and state.context is None:
            reason = "the model keeps something from call to call"
        described = tuple(Shape.of(x) if isinstance(x, torch.Tensor) else x for x in leaves)
        output = Output(described, spec, state.modules, None)
        checksum = zlib.crc32(repr((described, spec)).encode())
        answers = gather_ints([reason is None, checksum], self._mesh.world)
        if len(set(answers)) > 1 or reason is not None:
            reason = reason or "another rank saw that it cannot be shared"
            self._attempts[key] += 1
            if self._attempts[key] == _ATTEMPTS:  # what a model sets up at its first call is no state
                self._known[key] = reason
            return self._computed_by_all(reason, result)
        if state.context is None:
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            self._known[key] = replace(output, rows=rows_of(model, self._mesh, run, args, kwargs, tensors))
            return self._computed_by_all("the first call of its shapes", result)
        self._known[key] = output
        lengths = self._lengths(output, index, state)
        # The other groups may have missed what this context has seen before.
        return full_tensors(self._shared_call(output, lengths, lambda: result, (), {}), "the first call of its shapes")

    def _run_on_all(self, model: torch.nn.Module, run: Callable[[], Any]) -> tuple[Any, bool]:
        """What a call returns that every group computes, and whether it changed the model. A collective call.

        Raises:
            ShardingError: it raised an error on other ranks. On these it is that error.
        """
        error = None
        try:
            found = changes_while(model, run)
        except Exception as raised:
            error = raised
        failed = [
            rank
            for rank, (is_bad,) in zip(self._axis.ranks, gather_ints([int(error is not None)], self._axis), strict=True)
            if is_bad
        ]
        if error is not None:
            raise error
        if failed:
            raise ShardingError(f"ranks {failed} raised an error in a transformer call that all compute", follows=True)
        return found

    def _shared_call(
        self,
        output: Output,
        lengths: Sequence[int],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        shapes = [leaf for leaf in output.leaves if isinstance(leaf, Shape)]
        lazies = [self._round.tensor(shape.size, shape.strides, shape.dtype, shape.device) for shape in shapes]
        result = Result(lengths, lazies, reason=output.rows if isinstance(output.rows, str) else "")
        group = self._axis.rank
        if isinstance(output.rows, BatchRows) and sum(lengths) == output.rows.count:
            result.places = output.rows.outputs
            start = sum(lengths[:group])
            args, kwargs = output.rows.take(args, kwargs, start, start + lengths[group])
        if lengths[group]:
            try:
                leaves = tree_flatten(run(*args, **kwargs))[0]
                result.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            except Exception as error:  # the other groups hear of it in the exchange that they wait in
                result.error = error
        self._results.append(result)
        found = iter(lazies)
        returned = tree_unflatten([next(found) if isinstance(x, Shape) else x for x in output.leaves], output.spec)
        if not all(map(any, zip(*(one.lengths for one in self._results), strict=True))):
            return returned
        return full_tensors(returned, "all groups had their turn")

    def _exchange(self, results: list[Result], _reason: str) -> None:
        """Bring every result of a round to all groups."""
        if not results:
            return  # they were dropped
        self._begin_round()
        turns = [sum(lengths) for lengths in zip(*(result.lengths for result in results), strict=True)]
        self.counts.units += sum(turns)
        self.counts.rounds += max(turns)
        self.counts.rows += sum(sum(result.lengths) for result in results if result.places is not None)
        if max(turns) == sum(turns):  # one group did it all
            self.counts.reasons.update(result.reason for result in results if result.reason)
        exchange_results(results, self._axis)


class _SharedCalls:
    """Stands in the place of a model's compiled call.

    Attributes:
        compiled: what was there before.
    """

    def __init__(
        self, branches: Branches, model: torch.nn.Module, index: int, check: SameCallCheck, compiled: Any
    ) -> None:
        self.compiled = compiled
        self._branches, self._model, self._index, self._check = branches, model, index, check

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the transformer."""
        run = self.compiled or self._model._call_impl
        return self._branches.call(self._model, self._index, self._check, run, args, kwargs)
