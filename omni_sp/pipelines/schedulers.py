"""Another scheduler for one call of a pipeline, made from the configuration of the loaded one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

from omni_sp.errors import SamplingParamsError
from omni_sp.pipelines import quirks
from omni_sp.validation import shown, suggestion

StepFunction = Callable[..., Any]
_FLOW = "flow_prediction"
_error = partial(SamplingParamsError, param="scheduler")


def step_function(scheduler: Any) -> StepFunction:
    """The ``step`` that a scheduler has now as a function of the scheduler, so that a deep copy's steps the copy."""
    own = vars(scheduler).get("step")
    if own is None or isinstance(own, MethodType):
        return type(scheduler).step if own is None else own.__func__

    @wraps(own)
    def step(_this: Any, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return step


@contextmanager
def scheduler_replaced(pipe: Any, chosen: str | tuple[str, Mapping[str, Any]] | None) -> Iterator[None]:
    """Let a pipeline step with another scheduler until the block ends; None leaves it its own.

    All ranks make it alike of what all of them have: the request, and the loaded configuration.

    Args:
        chosen: the name of a class of diffusers, or (name, options), which replace entries of the configuration.

    Raises:
        SamplingParamsError: there is no such scheduler or option, or it predicts something else than the model does.
    """
    if chosen is None:
        yield
        return
    name, options = (chosen, {}) if isinstance(chosen, str) else chosen
    loaded = getattr(pipe, "scheduler", None)
    if loaded is None:
        raise _error(f"{type(pipe).__name__} has no scheduler, so scheduler={shown(name)} cannot take its place")
    pipe.scheduler = _made_from(loaded, name, options)
    try:
        yield
    finally:
        pipe.scheduler = loaded


def _made_from(loaded: Any, name: str, options: Mapping[str, Any]) -> Any:
    import diffusers

    own, wanted = type(loaded), _predicts(loaded)
    known = quirks.FLOW_SCHEDULERS if wanted == _FLOW else [one.__name__ for one in loaded.compatibles]
    compatible = sorted({own.__name__, *known})
    kind: Any = own if name == own.__name__ else getattr(diffusers, name, None)
    if not _is_scheduler(kind):
        raise _error(f"diffusers has no scheduler {shown(name)}; {suggestion(name, compatible, 'there are {known}')}")
    taken = _parameters(kind)
    for option in options:
        if option not in taken:
            raise _error(f"{name} has no option {shown(option)}; {suggestion(option, taken)}")
    entries = {**(_equivalents(loaded) if wanted == _FLOW else {}), **options}
    if "use_flow_sigmas" not in taken and "prediction_type" not in options:
        entries.pop("prediction_type", None)
    try:
        made = kind.from_config(loaded.config, **{entry: value for entry, value in entries.items() if entry in taken})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise _error(f"{name} cannot be made with {shown(dict(options))}: {' '.join(str(error).split())}") from error
    found = _predicts(made)
    is_chosen = "prediction_type" in options and _FLOW not in (wanted, found)
    if (found != wanted and not is_chosen) or (wanted != _FLOW and name not in compatible):
        raise _error(
            f"{name} steps by {found}, and cannot take the place of {own.__name__}, which steps by {wanted}: "
            f"use one of {', '.join(compatible)}"
        )
    return made


def _is_scheduler(kind: Any) -> bool:
    from diffusers import SchedulerMixin

    return isinstance(kind, type) and issubclass(kind, SchedulerMixin)


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _entry(scheduler: Any, name: str) -> Any:
    """An entry of its configuration, without those that it keeps for other classes and does not read."""
    return scheduler.config.get(name) if name in _parameters(type(scheduler)) else None


def _predicts(scheduler: Any) -> str:
    """What a scheduler takes the model's output for, in the words of ``prediction_type``."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return _FLOW
    predicts = str(_entry(scheduler, "prediction_type") or "epsilon")
    return (
        f"{_FLOW} without use_flow_sigmas"
        if predicts == _FLOW and not _entry(scheduler, "use_flow_sigmas")
        else predicts
    )


def _equivalents(loaded: Any) -> dict[str, Any]:
    """What the configuration of a flow says, by the other names that schedulers have for it."""
    shift = next((value for name in quirks.SHIFTS if (value := _entry(loaded, name)) is not None), None)
    shifts = {} if shift is None else dict.fromkeys(quirks.SHIFTS, shift)
    return {"use_flow_sigmas": True, "prediction_type": _FLOW, **shifts}
