"""Every error that omni_sp raises on purpose.

OmniSPError
├── InvalidInputError (ValueError)      something the caller can put right
│   ├── ConfigError                     degrees, devices, engine options
│   ├── SamplingParamsError             a parameter this pipeline cannot take, or a value out of range
│   ├── ModelNotFoundError              no such model, or a folder that is no diffusers pipeline
│   ├── UnsupportedModelError           a transformer whose tokens cannot be found
│   └── UnsupportedAttentionError       an attention that the core refuses rather than get wrong
├── NonFiniteResultError (ArithmeticError)   a result with NaN or infinite numbers; names the stage that made them
├── ShardingError (RuntimeError)        a sharded forward that could not be exact, or ranks that disagree
└── EngineError (RuntimeError)          the rank processes
    ├── RankFailedError                 a rank raised or died; carries its traceback
    │   └── CallFailedError             the call failed on all ranks alike; they stand ready for the next one
    ├── RequestAbortedError             somebody aborted the request
    ├── QueueFullError                  too many requests wait already
    └── EngineClosedError               the engine was used after close(), or after a failure closed it
"""

from __future__ import annotations

from typing import Literal

_LONGEST_MESSAGE = 2000


class OmniSPError(Exception):
    """The root of the tree; catch it to catch everything below.

    Args:
        message: what was wrong, the values, and the way out; of a very long one the middle is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, _LONGEST_MESSAGE))


class InvalidInputError(OmniSPError, ValueError):
    """Bad input: the message says what was wrong, the values, and the way out."""


class ConfigError(InvalidInputError):
    """Degrees, devices or engine options that cannot be."""


class SamplingParamsError(InvalidInputError):
    """A sampling parameter that the chosen pipeline cannot take, or a value out of range.

    Args:
        message: what was wrong, the values, and the way out.
        param: the parameter or the field of the prompt that is to blame, by its name in OmniDiffusionSamplingParams or
            in a prompt; None where it is no single one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(InvalidInputError):
    """No such model, or a folder that holds no diffusers pipeline."""


class UnsupportedModelError(InvalidInputError):
    """A transformer without a plan whose token streams cannot be found."""


class UnsupportedAttentionError(InvalidInputError):
    """An attention call that the core refuses, because it could not be exact or no kernel can serve it."""


class NonFiniteResultError(OmniSPError, ArithmeticError):
    """A result that holds NaN or infinite numbers, or was made of them. Whoever drew it goes on.

    Args:
        message: what was wrong, and the way out.
        stage: the first stage of the call that gave such numbers, for people.
    """

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class ShardingError(OmniSPError, RuntimeError):
    """A sharded forward that could not be exact, or ranks that hold different things.

    Args:
        message: what was wrong, and the way out.
        follows: it tells of an error that other ranks raise themselves.
    """

    def __init__(self, message: str, *, follows: bool = False) -> None:
        super().__init__(message)
        self.follows = follows


class EngineError(OmniSPError, RuntimeError):
    """Something went wrong with the rank processes."""


FailureKind = Literal["raised", "died", "silent", "out_of_memory"]


class RankFailedError(EngineError):
    """A rank raised, died or fell silent.

    Args:
        message: which rank, and what happened to it.
        rank: the number of the rank that failed first.
        kind: "raised"; "out_of_memory", where it raised for want of memory; "died", where its process ended by itself,
            which need not have anything to do with what was asked of it; or "silent".
        rank_traceback: its traceback as text; empty when the process died without one (killed, out of memory).
    """

    def __init__(self, message: str, *, rank: int, kind: FailureKind = "raised", rank_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.kind = kind
        self.rank_traceback = rank_traceback


class CallFailedError(RankFailedError):
    """A call failed on all ranks alike, and none of them waits for another: the model stays loaded.

    It takes what RankFailedError takes.
    """


class EngineClosedError(EngineError):
    """The engine was used after close(), or after a failure that ended it."""


class RequestAbortedError(EngineError):
    """Somebody aborted the request; the ranks go on with the next."""


class QueueFullError(EngineError):
    """Too many requests wait already."""


def shortened(text: str, limit: int) -> str:
    """Leave out the middle of a text of more than ``limit`` characters.

    What is wrong stands at a message's beginning, the way out at its end.
    """
    if len(text) <= limit:
        return text
    kept = max(1, (limit - 30) // 2)
    return f"{text[:kept]} … ({len(text) - 2 * kept} characters) … {text[-kept:]}"
