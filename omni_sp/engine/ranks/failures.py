"""From an error on a rank to a message, and from the messages of all ranks to the one error that they amount to."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import NoReturn

from omni_sp import errors
from omni_sp.engine.messages import Done, Failed, RankExited
from omni_sp.engine.ranks import OUT_OF_REACH
from omni_sp.errors import (
    CallFailedError,
    FailureKind,
    InvalidInputError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
    ShardingError,
)

Failures = Mapping[int, Failed | RankExited]

# After a failure, how long to wait for what the other ranks say. An error of ours is expected of all of them; a lost
# peer has a cause elsewhere; any other error may be raised by all ranks alike, or by one that the others wait for in an
# exchange.
_SHARED_ERROR_S = 10.0
_OTHERS_S = 3.0
_EXIT_S = 0.3
_PEER_LOSS_MESSAGES = ("closed by peer", "reset by peer", "timed out", "timeout", "gloo", "nccl", "broken pipe")
_DEVICE_MESSAGES = ("cuda error", "device-side assert", "cudnn_status", "hip error")


class RankTraceback(Exception):  # noqa: N818  (a text that Python prints above the error it caused)
    """Another process's traceback, as the cause of an error here."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"on rank {rank}:\n\n{text}")


def as_message(error: BaseException) -> Failed:
    """An error as a message; the traceback goes along as text."""
    frames = traceback.extract_tb(error.__traceback__)
    return Failed(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        is_shared=isinstance(error, (InvalidInputError, RequestAbortedError)),
        is_peer_loss=_is_peer_loss(error),
        is_out_of_memory=_is_out_of_memory(error),
        is_device_error=_is_device_error(error),
        param=error.param if isinstance(error, SamplingParamsError) else None,
        follows=isinstance(error, ShardingError) and error.follows,
        place=f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "",
    )


def rank_failed(rank: int, size: int, failure: Failed) -> RankFailedError:
    """The error for a rank that raised."""
    return RankFailedError(
        f"rank {rank} of {size} raised {failure.kind}: {_text_of(failure)}",
        rank=rank,
        kind=_kind_of(failure),
        rank_traceback=failure.traceback,
    )


def call_failed(failed: Mapping[int, Failed], size: int) -> CallFailedError:
    """The error for ranks that raised alike and are in step."""
    rank, failure = min(failed.items(), key=lambda item: (item[1].follows, item[0]))
    failed = {rank: one for rank, one in failed.items() if one.follows == failure.follows}
    who = f"all {size} ranks" if len(failed) == size > 1 else f"rank {rank} of {size}"
    return CallFailedError(
        f"{who} raised {failure.kind}: {_text_of(failure)}; the model stays loaded",
        rank=rank,
        kind=_kind_of(failure),
        rank_traceback=failure.traceback,
    )


def are_in_step(reports: Mapping[int, Done | Failed | RankExited], size: int) -> bool:
    """Whether the ranks can make the next call after these ends of one.

    All have reported, so none waits in an exchange; all have made the same exchanges (those of a group with each other,
    see ParallelMesh.exchanges_so_far), so none of them lacks a partner; and those that raised did so alike, or tell of
    the others' error. A device in error cannot go on, nor can ranks whose connections broke.
    """
    failed = [report for report in reports.values() if isinstance(report, Failed)]
    if len(reports) < size or any(isinstance(report, RankExited) for report in reports.values()):
        return False
    if any(failure.is_device_error or failure.is_peer_loss for failure in failed):
        return False
    exchanges = {report.exchanges for report in reports.values() if not isinstance(report, RankExited)}
    groups, _, among_groups = (set(values) for values in zip(*exchanges, strict=True))
    own = [one for one in failed if not one.follows] or failed
    texts, places = ({(one.kind, one.message) for one in own}, {(one.kind, one.place) for one in own})
    have_partners = len(exchanges) == len(groups) and len(among_groups) == 1
    return have_partners and min(len(texts), len(places)) <= 1


def raise_for(
    failures: Failures, size: int, *, independent: bool = False, done: Mapping[int, Done] | None = None
) -> NoReturn:
    """Raise the error that the failures of ``size`` ranks amount to.

    Where all ranks raised one of our own errors alike, it is that error, of its own class; CallFailedError where a call
    failed otherwise and the ranks are in step. Otherwise it is the root cause: a rank that raised by itself comes
    before one that died, and that before one that only lost its peers.

    Args:
        independent: each rank was doing work of its own, such as reading files that only rank 0 needs: one rank's error
            of ours needs no other.
        done: of a call, the answers of the ranks that finished it.
    """
    failed = {rank: message for rank, message in failures.items() if isinstance(message, Failed)}
    shared = {(message.kind, message.message) for message in failed.values() if message.is_shared}
    in_step = done is not None and are_in_step({**done, **failures}, size)
    is_everybodys = len(failed) == size or (independent and len(failed) == len(failures))
    is_ours = len(shared) == 1 and all(message.is_shared for message in failed.values())
    if is_everybodys and is_ours and (done is None or in_step):
        rank, message = min(failed.items())
        ours = getattr(errors, message.kind, InvalidInputError)(message.message)
        if isinstance(ours, SamplingParamsError):
            ours.param = message.param
        raise ours from RankTraceback(rank, message.traceback)
    if in_step:
        error = call_failed(failed, size)
        raise error from RankTraceback(error.rank, error.rank_traceback)
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
    return 0.0 if failure.is_device_error else _OTHERS_S


def _text_of(failure: Failed) -> str:
    return failure.message.strip() or "no message"


def _kind_of(failure: Failed) -> FailureKind:
    return "out_of_memory" if failure.is_out_of_memory else "raised"


def _cause_order(failure: Failed | RankExited) -> int:
    if isinstance(failure, RankExited):
        return 1
    return 2 if failure.is_peer_loss or failure.follows else 0


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode == OUT_OF_REACH:
        return "is out of reach: its machine, the network, or the process there that watched it"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    hint = " (out of memory?)" if exitcode == -9 else ""
    return f"was killed by signal {-exitcode}{hint}"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__.endswith("OutOfMemoryError"):
        return True
    # torch has no class of its own for a CPU without memory.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _is_device_error(error: BaseException) -> bool:
    """True for what leaves a device unusable for this process. torch reports some of it by the text alone."""
    if type(error).__name__ == "AcceleratorError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _DEVICE_MESSAGES)


def _is_peer_loss(error: BaseException) -> bool:
    """True for what a rank raises because another one is gone: c10d's own errors, and what gloo and NCCL say."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _PEER_LOSS_MESSAGES)
