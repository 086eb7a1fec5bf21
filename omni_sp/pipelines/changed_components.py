"""Which components of a pipeline are others than when it was parallelized: their calls are no longer shared.

A rank that replaces its text encoder or VAE, or compiles it, runs it by itself. Where the other ranks do not, they wait
for that rank in an exchange that it never enters. So the ranks compare this before they use any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from omni_sp.collectives import gather_ints, gather_texts
from omni_sp.errors import ShardingError
from omni_sp.mesh import Axis

_NAME = "components of the pipeline that were replaced or compiled"
_COMPILED_CALL = "_compiled_call_impl"
_SAME: Mapping[str, str] = {_NAME: "none"}


class ChangedComponents:
    """What a pipeline's models were when it was parallelized, and are now. Before ``note()`` nothing counts as changed.

    Args:
        pipe: a pipeline, or a transformer alone, which has no components.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._noted: list[tuple[str, torch.nn.Module, Any]] = []

    def note(self) -> None:
        """Take the models as they are now, with what parallelize() has put on them."""
        components = getattr(self._pipe, "components", None) or {}
        self._noted = [
            (name, model, vars(model).get(_COMPILED_CALL))
            for name, model in components.items()
            if isinstance(model, torch.nn.Module)
        ]

    def describe(self) -> Mapping[str, str]:
        """One line that differs where other components have changed. One that was taken away, as None, runs nowhere."""
        changed = []
        for name, noted, compiled_call in self._noted:
            model = getattr(self._pipe, name, None)
            if model is noted:
                if vars(noted).get(_COMPILED_CALL) is not compiled_call:
                    changed.append(f"{name} (compiled)")
            elif model is not None:
                changed.append(f"{name} (now another {type(model).__name__})")
        return {_NAME: ", ".join(changed)} if changed else _SAME

    def require_same(self, axis: Axis) -> None:
        """Compare the ranks, which takes one small exchange.

        Raises:
            ShardingError: other components have changed on one rank than on another.
        """
        [own] = self.describe().values()
        if len(set(gather_ints([zlib.crc32(own.encode())], axis))) == 1:
            return
        shown = ", ".join(
            f"rank {rank}: {text}" for rank, text in zip(axis.ranks, gather_texts(own, axis), strict=True)
        )
        raise ShardingError(
            f"the ranks differ in the {_NAME}: {shown}. Every rank must do the same to them, before the pipeline is "
            "called"
        )
