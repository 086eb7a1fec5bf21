"""Stands in front of a block: replays what was recorded of its kind, records it, or has it followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from omni_sp.sharding.diffusers_internals import has_group_offloading
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.replay.recorder import Recorder
from omni_sp.sharding.replay.state import ModuleState, aliases, describe, modes
from omni_sp.sharding.replay.store import TapeStore
from omni_sp.sharding.replay.tape import Tape
from omni_sp.sharding.tracked import TokenTensor
from omni_sp.sharding.tracked.recording import current_recording


class BlockPlayer:
    """Takes the calls of one block, in the place that torch has for a compiled call.

    A replay sends exactly what following would send, in the same order, so ranks need not agree on who replays.

    Args:
        is_foreign: there is code in the block that is no library's.
        compile_options: of torch.compile, where its tapes are compiled; else None.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        store: TapeStore,
        *,
        is_foreign: bool,
        compile_options: Mapping[str, Any] | None,
    ) -> None:
        self._block, self._store, self._is_foreign = block, store, is_foreign
        self._compile_options = compile_options
        self._state: ModuleState | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block."""
        forward = current_forward()
        if forward is None or current_recording() is not None:
            return self._block._call_impl(*args, **kwargs)
        try:
            state = self._current_state()
            args, kwargs = _run_pre_hooks(self._block, args, kwargs)
            arguments: list[torch.Tensor] = []
            key = (self._kind, modes(), describe(args, arguments), describe(kwargs, arguments), aliases(arguments))
            if not any(type(x) is TokenTensor for x in arguments):
                raise ValueError("no argument is sharded")
        except ValueError as reason:
            return self._follow(str(reason), args, kwargs)
        tapes = self._store.find(key)
        if isinstance(tapes, str):
            return self._follow(tapes, args, kwargs)
        for place, tape in enumerate(tapes):
            if tape.accepts(arguments, forward):
                # The next block of this kind gets the same arguments, and asks this tape first.
                tapes.insert(0, tapes.pop(place))
                self._store.counts.replayed += 1
                if tape.waits:
                    self._store.waits = f"{type(self._block).__name__} {tape.waits}"
                if self._compile_options is not None and not tape.is_compiled:
                    self._store.compile(tape, self._kind, type(self._block).__name__, self._compile_options)
                return tape.replay(arguments, state.weights)
        if not self._store.make_room(key):
            return self._follow("decides by numbers that are others every time", args, kwargs)
        return self._record(key, state, arguments, args, kwargs)

    def _follow(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._store.counts.followed[reason] += 1
        return self._block._call_impl(*args, **kwargs)

    def _record(
        self,
        key: Any,
        state: ModuleState,
        arguments: list[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        writes = [x.writes[0] for x in arguments if isinstance(x, TokenTensor)]
        recorder = Recorder(
            [x._local if isinstance(x, TokenTensor) else x for x in arguments],
            [isinstance(x, TokenTensor) for x in arguments],
            state.weights,
        )
        output = recorder.record(lambda: self._block._call_impl(*args, **kwargs))
        if [x.writes[0] for x in arguments if isinstance(x, TokenTensor)] != writes:
            recorder.refuse("writes to an argument or a weight")
        if not state.is_current():
            recorder.refuse("changes its own attributes")
        try:
            if key[2:4] != (describe(args, []), describe(kwargs, [])):
                recorder.refuse("changes a list or a dict among its arguments")
            if recorder.refusal is not None:
                raise ValueError(recorder.refusal)
            self._store.add(key, Tape(recorder, arguments, output))
        except ValueError as reason:
            self._store.add(key, str(reason))
            self._store.counts.followed[str(reason)] += 1
            return output
        self._store.counts.recorded += 1
        return output

    def _current_state(self) -> ModuleState:
        """What the block is now.

        Raises:
            ValueError: it cannot be recorded.
        """
        state = self._state
        if state is None or not state.is_current():
            self._state = state = ModuleState(self._block)
            self._refusal = self._reason_to_follow()
            self._kind = -1 if self._refusal else self._store.kind(state.description())
        if self._refusal:
            raise ValueError(self._refusal)
        return state

    def _reason_to_follow(self) -> str:
        if self._is_foreign:
            return "there is code that is no library's in the block: it may do more than compute"
        if any(map(has_group_offloading, self._block.modules())):
            return "group offloading moves its weights"
        return "the block has hooks on its output" if self._block._forward_hooks else ""


def _run_pre_hooks(
    block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the hooks that shard the block's inputs. They may run twice: what is sharded already stays as it is."""
    for number, hook in block._forward_pre_hooks.items():
        if number in block._forward_pre_hooks_with_kwargs:
            changed = hook(block, args, kwargs)
            args, kwargs = changed if changed is not None else (args, kwargs)
        else:
            changed = hook(block, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def block_lists(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The blocks of a transformer, each once: what lists at its top hold, where it has parts of its own."""
    children, seen = list(model.children()), set()
    for child in children:
        if isinstance(child, torch.nn.ModuleDict):
            children += child.values()
        elif isinstance(child, torch.nn.ModuleList):
            for block in child:
                if block not in seen and any(True for _ in block.children()):
                    seen.add(block)
                    yield block
