"""Which pipeline calls a transformer, and where its steps and its calls end.

Several pipelines may share a transformer: one from text and one from pictures (``from_pipe``), each perhaps with a
scheduler of its own. All of them have to be seen, since after a step, and after a call, one rank alone may read what it
gets: previews, callbacks, whoever called the pipeline.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from omni_sp.pipelines.schedulers import step_function
from omni_sp.sharding.lazy import full_tensors

_END = "maybe_free_model_hooks"
"""What diffusers' pipelines call of themselves at the end."""
_MARK = "_omni_sp_watched"


def calling_pipeline() -> Any:
    """The pipeline whose ``__call__`` is under way, the innermost one; None outside of any."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount and code.co_varnames[0] == "self":
            caller = frame.f_locals.get("self")
            if all(hasattr(type(caller), name) for name in ("components", _END)):
                return caller
        frame = frame.f_back
    return None


class PipelineWatch:
    """Sees the steps and the ends of the calls of every pipeline that calls a transformer, until ``remove()``.

    Args:
        pipe: the pipeline that is parallelized.
        before_step: called before each step of a scheduler.
        at_end: called where a call of a pipeline ends.
    """

    def __init__(self, pipe: Any, before_step: Callable[[], None], at_end: Callable[[], None]) -> None:
        self._pipe, self._before_step, self._at_end = pipe, before_step, at_end
        self._schedulers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pipes: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watch_end(pipe)

    def watch(self) -> bool:
        """Watch the pipeline that calls now; False where it has no scheduler."""
        pipe = calling_pipeline() or self._pipe
        if pipe not in self._pipes:
            self._watch_end(pipe)
        schedulers = [
            x
            for x in pipe.components.values()
            if callable(getattr(x, "step", None)) and not isinstance(x, torch.nn.Module)
        ]
        for scheduler in schedulers:
            if scheduler not in self._schedulers or not hasattr(scheduler.step, _MARK):
                self._watch_steps(scheduler)
        return bool(schedulers)

    def remove(self) -> None:
        """Restore the pipelines and the schedulers. A second call does nothing."""
        for one, name in [*((x, "step") for x in self._schedulers), *((x, _END) for x in self._pipes)]:
            mark: _Mark | None = getattr(vars(one).get(name), _MARK, None)
            if mark is not None:
                mark.watches.pop(self, None)
                if not mark.watches:
                    del vars(one)[name]
                    if mark.own is not None:
                        setattr(one, name, mark.own)
        self._schedulers.clear()
        self._pipes.clear()

    def _watch_steps(self, scheduler: Any) -> None:
        """Give a scheduler plain tensors."""
        self._schedulers.add(scheduler)
        mark: _Mark | None = getattr(scheduler.step, _MARK, None)
        if mark is not None:
            mark.watches[self] = None
            return
        original, mark = step_function(scheduler), _Mark(vars(scheduler).get("step"), self)

        @functools.wraps(original)  # pipelines look into the signature for what step() takes
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            for watch in list(mark.watches):
                watch._before_step()
            return original(this, *full_tensors(args, "the scheduler"), **full_tensors(kwargs, "the scheduler"))

        setattr(step, _MARK, mark)
        # A method, and no function: a deep copy of the scheduler then steps itself.
        scheduler.step = types.MethodType(step, scheduler)

    def _watch_end(self, pipe: Any) -> None:
        """See where a pipeline returns."""
        original = getattr(pipe, _END, None)
        if original is None:
            return
        self._pipes.add(pipe)
        mark: _Mark | None = getattr(original, _MARK, None)
        if mark is not None:
            mark.watches[self] = None
            return
        mark = _Mark(vars(pipe).get(_END), self)

        @functools.wraps(original)
        def end() -> Any:
            for watch in list(mark.watches):
                watch._at_end()
            return original()

        setattr(end, _MARK, mark)
        setattr(pipe, _END, end)


class _Mark:
    """On what stands in the place of a method: who watches, and what the instance had there of its own."""

    def __init__(self, own: Any, watch: PipelineWatch) -> None:
        self.own = own
        # In the order in which they came, as on all ranks, which exchange results in it: a set has another on each.
        self.watches: weakref.WeakKeyDictionary[PipelineWatch, None] = weakref.WeakKeyDictionary({watch: None})
