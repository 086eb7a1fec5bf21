"""What an encoder gives on the rank that runs it, brought to all ranks when it is needed, and only what is needed.

A call of new shapes is described to all ranks as soon as it was made; of known shapes all ranks know what it will give.
Either way they get lazy tensors and go on, so that other ranks run other encoders meanwhile. What the pipeline uses of
all these crosses in one exchange; hidden states and logits that nobody looks at stay where they are.
"""

from __future__ import annotations

import functools
import operator
import pickle
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from omni_sp.collectives import gather_bytes, require_equal
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis
from omni_sp.pipelines.branch_learning import reason_against
from omni_sp.pipelines.branch_results import Output, Result, Shape, exchange_bytes
from omni_sp.pipelines.encoder_state import BITS, CHANGED, OWN_REASONS, EncoderState
from omni_sp.sharding.lazy import LazyRound, LazyTensor

_MAX_KNOWN = 1024
"""Shapes of inputs whose results are remembered; prompts that are not padded have as many as there are lengths."""
_CACHES = "transformers.cache_utils"
_DIFFERENT = (
    "the ranks call {what} with different inputs, or in different modes: {{values}} (checksums). Every rank must run "
    "the same program on the same prompts and pictures"
)


@dataclass
class EncoderCall:
    """One call of an encoder.

    Attributes:
        name: of the component and its method, for people.
        owner: the rank that makes it.
        inputs: a checksum of what it gets, the same on all ranks.
        lazies: what all ranks get. They are not kept here: what a pipeline drops, nobody needs.
        error: what it raised on the owner.
    """

    name: str
    owner: int
    inputs: int
    lazies: list[weakref.ref[LazyTensor]] = field(default_factory=list)
    error: Exception | None = None


@dataclass
class _Answer:
    """What the owner says of a call of new shapes.

    Attributes:
        output: what it gave, and of which shapes; or why every rank has to make the call itself.
        is_lasting: whether another call of these shapes gives the same shapes, and draws no random numbers.
        random_states: of torch's generators after it, by device type, where it drew random numbers.
        error: what it raised.
    """

    output: Output | str = ""
    is_lasting: bool = False
    random_states: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None


class Unsent:
    """Stands for a cache of keys and values among an encoder's results: no pipeline is known to use one.

    Raises:
        ShardingError: somebody looks at it, on any rank.
    """

    def _refuse(self, *_: Any) -> NoReturn:
        raise ShardingError(
            "an encoder's past_key_values were used, which stay on the rank that runs it: give "
            "text_encoder_parallel=False, so that every rank runs it"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse


class EncoderResults:
    """The calls of a pipeline's encoders whose results are still to be exchanged.

    All ranks make the same calls in the same order, so they all know who makes which, and what crosses when. What one
    rank alone may have, such as a hook on an encoder, is sent to all before the first of several calls.

    Args:
        axis: all ranks.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._known: dict[Any, Output | str] = {}
        self._agreed: dict[str, str | None] = {}
        self.drop()

    def drop(self) -> None:
        """Begin anew: what was not exchanged yet is forgotten when nobody holds it."""
        self._calls: list[EncoderCall] = []
        self._round = LazyRound(functools.partial(self._exchange, self._calls))

    def num_pending(self, name: str) -> int:
        """Calls of one component whose results are still to be exchanged."""
        return sum(call.name.partition(".")[0] == name for call in self._calls)

    def get(
        self,
        name: str,
        owner: int,
        key: Any,
        modes: tuple[bool, ...],
        states: Mapping[str, EncoderState],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, str | None]:
        """The result of a call, lazy; or that of this rank, and why every rank has made the call.

        Args:
            name: of the component and its method.
            owner: the rank that makes it for all.
            key: what the shapes of its results follow from; None where they follow from more than shapes.
            modes: of the encoder and of this rank, from which shapes follow too.
            states: of each encoder, on this rank.
            run: makes it.
            args: for ``run``, plain values and tensors.
            kwargs: for ``run``, plain values and tensors.

        Raises:
            ShardingError: the ranks make different calls.
            Exception: what the call raised, on all ranks.
        """
        call = EncoderCall(name, owner, _checksum(modes, args, kwargs))
        key = None if key is None else (name, modes, *key)
        output = None if key is None else self._known.get(key)
        if isinstance(output, str):
            return run(*args, **kwargs), output
        if output is None or not self._calls:
            self._agree(call, states)
            if key not in self._known:  # the encoder has changed
                output = None
        encoder = name.partition(".")[0]
        if (reason := self._agreed[encoder]) is not None:
            return run(*args, **kwargs), reason
        leaves: Sequence[Any] | None = None
        if output is None:
            answer, leaves = _answer_of(run, args, kwargs) if self._axis.rank == owner else (_Answer(), None)
            output = self._broadcast_answer(call, key, answer)
            if isinstance(output, str):
                return run(*args, **kwargs) if leaves is None else leaves[0], output
        elif (late := states[encoder].reason()) is not None:
            # The others have begun a round without knowing of it. They hear of it in the exchange that ends the round.
            call.error = ShardingError(
                f"{encoder} changed between two calls of encoders on rank {self._axis.ranks[self._axis.rank]}: {late}. "
                "Let every rank do that before it calls the pipeline, or give text_encoder_parallel=False"
            )
        elif self._axis.rank == owner:
            leaves = _computed(call, output, run, args, kwargs)
        self._calls.append(call)
        return self._lazy_result(call, output, leaves, tree_flatten((args, kwargs))[0]), None

    def _agree(self, call: EncoderCall, states: Mapping[str, EncoderState]) -> None:
        """Find out for which encoders any rank has a reason to make their calls itself. A collective call.

        What is known of an encoder that has changed on any rank is forgotten on all.
        """
        flags = sum(state.flags() << BITS * place for place, state in enumerate(states.values()))
        by_rank = self._require_same([*self._calls, call], flags)
        of_any = functools.reduce(operator.or_, (flags for (flags,) in by_rank))
        self._agreed = {
            name: next((one for bit, one in enumerate(OWN_REASONS) if of_any >> BITS * place + bit & 1), None)
            for place, name in enumerate(states)
        }
        for place, name in enumerate(states):
            if of_any >> BITS * place & CHANGED:
                self._forget(name)

    def _forget(self, encoder: str) -> None:
        """Forget what an encoder's results look like. All ranks do it together."""
        self._known = {key: one for key, one in self._known.items() if key[0].partition(".")[0] != encoder}

    def _broadcast_answer(self, call: EncoderCall, key: Any, answer: _Answer) -> Output | str:
        """Send all ranks what a call of new shapes has given on its owner, and remember its shapes."""
        is_own = self._axis.rank == call.owner
        payload = pickle.dumps(replace(answer, error=_sendable(answer.error))) if is_own else b""
        sent: _Answer = _loaded(gather_bytes(payload, self._axis)[call.owner])
        if sent.error is not None:
            self.drop()
            self._raise(answer.error if is_own else sent.error, call, call.owner)
        if not is_own:
            _set_random_states(sent.random_states)
        if key is not None and (sent.is_lasting or isinstance(sent.output, str)):
            self._known[key] = sent.output
            if len(self._known) > _MAX_KNOWN:  # the first one is the same on all ranks
                del self._known[next(iter(self._known))]
        return sent.output

    def _lazy_result(self, call: EncoderCall, output: Output, leaves: Any, given: Sequence[Any]) -> Any:
        """The structure of a result with lazy tensors, which on the owner have their numbers beside them."""
        returned = []
        for place, leaf in enumerate(output.leaves):
            if isinstance(leaf, Shape):
                device = next((x.device for x in given if _is_on(x, leaf.device.type)), leaf.device)
                lazy = self._round.tensor(leaf.size, leaf.strides, leaf.dtype, device)
                lazy.computed = None if leaves is None else leaves[place]
                call.lazies.append(weakref.ref(lazy))
                leaf = lazy
            returned.append(leaf)
        return tree_unflatten(returned, output.spec)

    def _exchange(self, calls: list[EncoderCall], _reason: str) -> None:
        """Bring what is used of these calls' results to all ranks."""
        if calls is self._calls:
            self.drop()
        used = [
            (call, lazy)
            for call in calls
            for reference in call.lazies
            if (lazy := reference()) is not None and lazy.is_used and lazy.is_waiting
        ]
        if not used:
            return
        failed = next((place for place, call in enumerate(calls) if call.error is not None), None)
        if any(flag for (flag,) in self._require_same(calls, int(failed is not None))):
            self._raise_first(calls, failed)
        for kind in dict.fromkeys(lazy.device.type for _, lazy in used):
            exchange_bytes(
                [
                    Result(
                        [int(rank == call.owner) for rank in range(self._axis.size)],
                        [lazy],
                        tensors=[] if lazy.computed is None else [lazy.computed],
                    )
                    for call, lazy in used
                    if lazy.device.type == kind
                ],
                self._axis,
            )

    def _require_same(self, calls: Sequence[EncoderCall], *gathered: int) -> list[tuple[int, ...]]:
        message = _DIFFERENT.format(what=" and ".join(dict.fromkeys(call.name for call in calls)))
        described = [(call.name, call.owner, call.inputs) for call in calls]
        try:
            return require_equal(self._axis, message, gathered=gathered, calls=described)
        except ShardingError:
            self.drop()  # on all ranks, for their next calls
            raise

    def _raise_first(self, calls: Sequence[EncoderCall], own: int | None) -> NoReturn:
        """Raise the error of the first rank that has one, on all ranks."""
        failure = b"" if own is None else pickle.dumps((own, _sendable(calls[own].error)))
        rank, sent = next((rank, sent) for rank, sent in enumerate(gather_bytes(failure, self._axis)) if sent)
        place, error = _loaded(sent)
        self._forget(calls[place].name.partition(".")[0])  # it may be another one than it was
        self._raise(calls[place].error if rank == self._axis.rank else error, calls[place], rank)

    def _raise(self, error: Any, call: EncoderCall, rank: int) -> NoReturn:
        """Raise on every rank what the call raised on one."""
        if hasattr(error, "add_note"):  # from Python 3.11 on
            for_all = ", which makes it for all" if rank == call.owner else ""
            error.add_note(f"{call.name} raised this on rank {self._axis.ranks[rank]}{for_all}")
        raise error


def _answer_of(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Answer, Any]:
    """Make a call of new shapes.

    Returns:
        What to say of it, and the leaves of its result; where all ranks have to make it, the result as the only one.
    """
    given, structure = tree_flatten((args, kwargs))
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
    states = _random_states()
    try:
        result = run(*args, **kwargs)
    except Exception as error:
        return _Answer(error=error), None
    leaves, spec = tree_flatten(result, is_leaf=_is_cache)
    is_same = structure == tree_flatten((args, kwargs))[1]
    reason = reason_against([x for x in leaves if not _is_cache(x)], given, before, is_same)
    described = tuple(map(_described, leaves))
    output = Output(described, spec, ())
    if reason is not None or not _can_be_sent(output):
        return _Answer(output=reason or "a call returns what cannot be sent"), [result]
    drawn = {kind: state for kind, state in _random_states().items() if state != states.get(kind)}
    # Such numbers may follow from what is in the tensors.
    has_numbers = any(type(x) in (int, float, complex) for x in described)
    return _Answer(output=output, is_lasting=not drawn and not has_numbers, random_states=drawn), leaves


def _computed(call: EncoderCall, output: Output, run: Callable[..., Any], args: Any, kwargs: Any) -> list[Any] | None:
    """The leaves of a call of known shapes; None where it fails, of which the others hear in the exchange."""
    try:
        leaves: list[Any] = tree_flatten(run(*args, **kwargs), is_leaf=_is_cache)[0]
        if [*map(_look, leaves)] != [*map(_look, output.leaves)]:
            raise ShardingError(f"{call.name} gave results of other shapes than before, for inputs of the same shapes")
    except Exception as error:
        call.error = error
        return None
    return leaves


def _is_cache(x: Any) -> bool:
    return type(x).__module__.startswith(_CACHES)


def _described(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        dense = torch.empty_like(x, device="meta")  # an expanded tensor is none
        return replace(Shape.of(x), strides=dense.stride())
    return Unsent() if _is_cache(x) else x


def _look(x: Any) -> Any:
    """What has to be alike from call to call."""
    if isinstance(x, Shape):
        return x.size, x.dtype
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    return None if isinstance(x, Unsent) or _is_cache(x) else x


def _is_on(x: Any, kind: str) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == kind


def _can_be_sent(x: Any) -> bool:
    try:
        _loaded(pickle.dumps(x))
    except Exception:
        return False
    return True


def _loaded(content: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's of its own tree specs, while it makes one
        return pickle.loads(content)


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one of ours that says the same where another process could not read it."""
    return error if _can_be_sent(error) else ShardingError(f"{type(error).__name__}: {error}")


def _checksum(modes: tuple[bool, ...], args: Any, kwargs: Any) -> int:
    """Of what a call gets: structure, plain values and whole numbers. Ranks may round other numbers differently."""
    leaves, spec = tree_flatten((args, kwargs))
    checksum = zlib.crc32(repr((modes, spec)).encode())
    for x in leaves:
        if isinstance(x, torch.Tensor):
            checksum = zlib.crc32(repr((tuple(x.shape), x.dtype)).encode(), checksum)
            if not x.is_floating_point() and not x.is_complex():
                content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                checksum = zlib.crc32(content.numpy().tobytes(), checksum)
        elif not isinstance(x, torch.device):
            checksum = zlib.crc32(repr(x).encode(), checksum)
    return checksum


def _random_states() -> dict[str, bytes]:
    """The states of the generators that a call may draw from."""
    states = {"cpu": torch.get_rng_state().numpy().tobytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


def _set_random_states(states: dict[str, bytes]) -> None:
    for kind, state in states.items():
        tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        (torch.set_rng_state if kind == "cpu" else torch.cuda.set_rng_state)(tensor)
