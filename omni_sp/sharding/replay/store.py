"""The tapes of one transformer, and how the calls of its blocks were made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_sp.sharding.replay.tape import Tape

logger = logging.getLogger(__name__)

_MAX_TAPES = 256
_MAX_TAPES_OF_A_KEY = 8
"""Of numbers that the model's code decides by, each set takes one, and the oldest makes room for the newest."""
_PAYS = 2
"""A tape is worth its recording when it was replayed so often."""
_MAX_COMPILED_OF_A_KIND = 8
"""As torch's own limit: each length of a text is a compilation, and what has ever new ones would only compile."""


@dataclass
class BlockCounts:
    """How the calls of a model's blocks were made.

    Attributes:
        replayed: by the operations that were recorded.
        recorded: followed, and taken down.
        compiled: how many recordings were compiled.
        followed: followed, by the reason why.
        in_graphs: forwards that were one CUDA graph; their blocks count as replayed.
        not_in_graphs: other forwards, where graphs are wanted, by the reason why.
    """

    replayed: int = 0
    recorded: int = 0
    compiled: int = 0
    followed: Counter[str] = field(default_factory=Counter)
    in_graphs: int = 0
    not_in_graphs: Counter[str] = field(default_factory=Counter)

    def add(self, other: BlockCounts) -> None:
        """Add another model's counts."""
        self.replayed += other.replayed
        self.recorded += other.recorded
        self.compiled += other.compiled
        self.followed.update(other.followed)
        self.in_graphs += other.in_graphs
        self.not_in_graphs.update(other.not_in_graphs)

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class TapeStore:
    """The tapes of one transformer; blocks of one kind share them.

    Args:
        compile_options: of torch.compile, where all tapes are compiled; else None.

    Attributes:
        on_compile: is called with a text before a tape is compiled, which takes long.
        waits: why the host waited for the device in a replay since somebody set it to "".
    """

    def __init__(self, compile_options: Mapping[str, Any] | None = None) -> None:
        self.compile_options = compile_options
        self.counts = BlockCounts()
        self.on_compile: Callable[[str], None] = logger.info
        self.waits = ""
        self._compiled: Counter[int] = Counter()
        self._kinds: dict[Any, int] = {}
        self._tapes: dict[Any, list[Tape] | str] = {}
        self._size = 0

    def kind(self, description: Any) -> int:
        """A number for everything that makes blocks do the same."""
        return self._kinds.setdefault(description, len(self._kinds))

    def find(self, key: Any) -> list[Tape] | str:
        """The tapes for a kind of block and of arguments; a text says why there can be none."""
        return self._tapes.get(key) or []

    def make_room(self, key: Any) -> bool:
        """Drop a tape where there are too many, of this key or of all: one that was recorded or used long ago.

        False where none has paid, so that to record more would be in vain.
        """
        tapes = self._tapes.get(key) or []
        if len(tapes) < _MAX_TAPES_OF_A_KEY and self._size < _MAX_TAPES:
            return True
        for old in [tapes] if len(tapes) >= _MAX_TAPES_OF_A_KEY else list(self._tapes.values()):
            if isinstance(old, list) and old and old[-1].replays >= _PAYS:
                old.pop()
                self._size -= 1
                return True
        return False

    def add(self, key: Any, tape: Tape | str) -> None:
        """Keep a tape, or why there can be none."""
        if isinstance(tape, str):
            self._tapes[key] = tape
            return
        tapes = self._tapes.pop(key, None) or []
        assert isinstance(tapes, list)
        self._tapes[key] = [tape, *tapes]
        self._size += 1

    def clear(self) -> None:
        """Drop all tapes: something was replaced that they do not ask about."""
        self._tapes.clear()
        self._compiled.clear()
        self._size = 0

    def compile(self, tape: Tape, kind: int, name: str, options: Mapping[str, Any]) -> None:
        """Compile a tape of a kind of block, unless too many of that kind are."""
        if self._compiled[kind] >= _MAX_COMPILED_OF_A_KIND:
            return
        self._compiled[kind] += 1
        self.counts.compiled += 1
        self.on_compile(f"compiling {name}: kind {len(self._compiled)}, shape {self._compiled[kind]} of it")
        tape.compile(options)
