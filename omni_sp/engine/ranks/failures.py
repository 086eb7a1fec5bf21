"""From an error on a rank to a message, and from the messages of all ranks to the one error that they amount to."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import NoReturn

from omni_sp import errors
from omni_sp.engine.messages import Failed, RankExited
from omni_sp.errors import InvalidInputError, RankFailedError, RequestAbortedError, SamplingParamsError

Failures = Mapping[int, Failed | RankExited]

# After a failure, how long to wait for what the other ranks say. An error that all ranks raise alike is expected of all
# of them; a lost peer has a cause elsewhere; a rank that raised by itself needs no witness, and the others may be
# waiting for it in an exchange.
_SHARED_ERROR_S = 10.0
_PEER_LOSS_S = 3.0
_EXIT_S = 0.3
_PEER_LOSS_MESSAGES = ("closed by peer", "reset by peer", "timed out", "timeout", "gloo", "nccl", "broken pipe")


class RankTraceback(Exception):  # noqa: N818  (a text that Python prints above the error it caused)
    """Another process's traceback, as the cause of an error here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n\n{text}")


def as_message(error: BaseException) -> Failed:
    """An error as a message; the traceback goes along as text."""
    return Failed(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        is_shared=isinstance(error, (InvalidInputError, RequestAbortedError)),
        is_peer_loss=_is_peer_loss(error),
        is_out_of_memory=_is_out_of_memory(error),
        param=error.param if isinstance(error, SamplingParamsError) else None,
    )


def rank_failed(rank: int, size: int, failure: Failed) -> RankFailedError:
    """The error for a rank that raised."""
    return RankFailedError(
        f"rank {rank} of {size} raised {failure.kind}: {failure.message.strip() or 'no message'}",
        rank=rank,
        kind="out_of_memory" if failure.is_out_of_memory else "raised",
        rank_traceback=failure.traceback,
    )


def raise_for(failures: Failures, size: int, *, independent: bool = False) -> NoReturn:
    """Raise the error that the failures of ``size`` ranks amount to.

    Where all ranks raised one of our own errors alike, it is that error, of its own class. Otherwise it is the root
    cause: a rank that raised by itself comes before one that died, and that before one that only lost its peers.

    Args:
        independent: each rank was doing work of its own, such as reading files that only rank 0 needs: one rank's error
            of ours needs no other.
    """
    failed = {rank: message for rank, message in failures.items() if isinstance(message, Failed)}
    shared = {(message.kind, message.message) for message in failed.values() if message.is_shared}
    is_everybodys = len(failed) == size or (independent and len(failed) == len(failures))
    if is_everybodys and len(shared) == 1 and all(message.is_shared for message in failed.values()):
        rank, message = min(failed.items())
        error = getattr(errors, message.kind, InvalidInputError)(message.message)
        if isinstance(error, SamplingParamsError):
            error.param = message.param
        raise error from RankTraceback(rank, message.traceback)
    rank, cause = min(failures.items(), key=lambda item: (_cause_order(item[1]), item[0]))
    if isinstance(cause, RankExited):
        raise RankFailedError(f"rank {rank} of {size} {_describe_exit(cause.exitcode)}", rank=rank, kind="died")
    raise rank_failed(rank, size, cause) from RankTraceback(rank, cause.traceback)


def wait_after_failure_s(failure: Failed | RankExited) -> float:
    """Seconds to wait for what other ranks say after this."""
    if isinstance(failure, RankExited):
        return _EXIT_S
    if failure.is_shared:
        return _SHARED_ERROR_S
    return _PEER_LOSS_S if failure.is_peer_loss else 0.0


def _cause_order(failure: Failed | RankExited) -> int:
    if isinstance(failure, RankExited):
        return 1
    return 2 if failure.is_peer_loss else 0


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    hint = " (out of memory?)" if exitcode == -9 else ""
    return f"was killed by signal {-exitcode}{hint}"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__.endswith("OutOfMemoryError"):
        return True
    # torch has no class of its own for a CPU without memory.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _is_peer_loss(error: BaseException) -> bool:
    """True for what a rank raises because another one is gone: c10d's own errors, and what gloo and NCCL say."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _PEER_LOSS_MESSAGES)
