"""Which rank runs a pipeline's text and image encoders: each runs on one, and all ranks get what it gives.

Encoders are dealt to the ranks in the order of their names. With ``cfg_parallel_size`` the prompts of one encoder,
positive and negative, take turns among the groups. What a rank does not run it need not have read.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.config import DiffusionParallelConfig
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines import quirks
from omni_sp.pipelines.branch_learning import PLAIN, autocast_modes, key_of
from omni_sp.pipelines.changed_components import ChangedComponents
from omni_sp.pipelines.encoder_results import EncoderResults
from omni_sp.pipelines.encoder_state import EncoderState
from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.sharding import ShardHandle
from omni_sp.sharding.forward_context import current_forward
from omni_sp.sharding.lazy import full_tensors
from omni_sp.sharding.weights import held_bytes

_METHODS = ("generate", "get_text_features", "get_image_features")
"""What pipelines call of an encoder beside the encoder itself."""
_FIRST = ("check_inputs", "encode_prompt")
"""What pipelines call of themselves before the first encoder, one or both of them."""


def encoder_names(components: Iterable[str]) -> list[str]:
    """Those of a pipeline's components that are encoders by their names, in the order in which ranks get them."""
    return sorted(name for name in components if re.fullmatch(quirks.ENCODERS, name))


def runs_encoder(config: DiffusionParallelConfig, rank: int, index: int) -> bool:
    """Whether a rank runs an encoder in every call of a pipeline, so that it should have read it before.

    Args:
        config: the degrees.
        rank: the rank's index in the mesh.
        index: of the encoder, among `encoder_names`.
    """
    return config.text_encoder_parallel is False or index % config.world_size == rank


class SharedEncoders:
    """The encoders of a pipeline, each on one rank of a mesh as its ``text_encoder_parallel`` says.

    All ranks decide alike: by the configuration, the pipeline and its call, by what the encoders are called with, and
    by what the ranks tell each other before the first encoder of a call.

    Args:
        pipe: a pipeline; a transformer alone has no encoder.
        mesh: the ranks.
        changed: tells whether the encoders are still those of the pipeline.

    Attributes:
        handles: one for each encoder, by name; none where nothing is to be shared.
        ranks: encoder -> the ranks that ran it since ``reset_counts()``.
        reasons: encoder -> why every rank ran it, where that was so.
    """

    def __init__(self, pipe: Any, mesh: ParallelMesh, changed: ChangedComponents) -> None:
        self._pipe, self._mesh, self._mode = pipe, mesh, mesh.config.text_encoder_parallel
        self._changed = changed
        self._undo = ExitStack()
        self.handles: dict[str, ShardHandle] = {}
        self.ranks: dict[str, set[int]] = {}
        self.reasons: dict[str, str] = {}
        self._is_inside = False
        self._models = _encoders_of(pipe)
        if self._mode is False or mesh.world_size == 1:
            return
        self._results = EncoderResults(mesh.world)
        self._states = {name: EncoderState(model) for name, model in self._models.items()}
        self._code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None) if self._models else None
        try:
            for index, (name, model) in enumerate(self._models.items()):
                self._attach(name, index, model)
            for method in _FIRST if self.handles else ():
                self._watch(method)
        except BaseException:
            self.remove()
            raise

    @property
    def weight_bytes(self) -> dict[str, int]:
        """The bytes of each encoder's weights that this rank holds: 0 of one that it has not read."""
        return {name: 0 if has_unread_weights(model) else held_bytes(model) for name, model in self._models.items()}

    def reset_counts(self) -> None:
        """Begin anew to note which ranks run what."""
        self.ranks.clear()
        self.reasons.clear()

    def drop(self) -> None:
        """Forget what is still to be exchanged, because the call that it belongs to was left."""
        if self.handles:
            self._results.drop()

    def remove(self) -> None:
        """Restore the encoders. A second call does nothing."""
        self._undo.close()
        for handle in self.handles.values():
            handle.remove()

    def _watch(self, method: str) -> None:
        """Compare the ranks where the pipeline's call begins: one whose encoder is another asks the others nothing."""
        pipe, original = self._pipe, getattr(self._pipe, method, None)
        if not callable(original) or method in vars(pipe):
            return

        @functools.wraps(original)
        def first(*args: Any, **kwargs: Any) -> Any:
            if self._mode is True or self._is_in_call():
                self._changed.require_same(self._mesh.world)
            return original(*args, **kwargs)

        setattr(pipe, method, first)
        self._undo.callback(vars(pipe).pop, method, None)

    def _attach(self, name: str, index: int, model: torch.nn.Module) -> None:
        """Take the calls of an encoder: its own in the place that torch has for a compiled call, so no hook runs."""
        handle = self.handles[name] = ShardHandle(model)
        handle.attach()
        call = _SharedCall(self, name, index, model, vars(model).get("_compiled_call_impl"))
        model._compiled_call_impl = call

        def undo() -> None:
            if vars(model).get("_compiled_call_impl") is call:
                model._compiled_call_impl = call.compiled

        handle.on_remove(undo)
        for method in _METHODS:
            original = getattr(model, method, None) if hasattr(type(model), method) else None
            if callable(original) and method not in vars(model):
                shared = functools.partial(self.call, name, index, model, method, original)
                setattr(model, method, functools.wraps(original)(shared))
                handle.on_remove(functools.partial(vars(model).pop, method, None))

    def call(
        self,
        name: str,
        index: int,
        model: torch.nn.Module,
        method: str,
        run: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make a call of an encoder, or get what the rank gives whose turn it is."""
        if self._is_inside:  # generate() calls the encoder for each token
            return run(*args, **kwargs)
        self._is_inside = True
        try:
            is_in_call = self._is_in_call()
            reason: str | None = 'it is called outside of the pipeline\'s call, and text_encoder_parallel is "auto"'
            if is_in_call or self._mode is True:
                reason = _reason_for_all(args, kwargs)
            if reason is not None:
                self._note(name, range(self._mesh.world_size), reason)
                return run(*args, **kwargs)
            args, kwargs = full_tensors((args, kwargs), name)
            called = f"{name}.{method}" if method else name
            turn = self._results.num_pending(name) % self._mesh.cfg.size
            owner = (index + turn * self._mesh.sequence.size) % self._mesh.world_size
            key = None if method == "generate" else key_of(args, kwargs)
            modes = (model.training, *autocast_modes())
            result, reason = self._results.get(called, owner, key, modes, self._states, run, args, kwargs)
            self._note(name, [owner] if reason is None else range(self._mesh.world_size), reason)
            # Outside of the pipeline's call anybody may read it, on one rank alone.
            return result if is_in_call else full_tensors(result, "the caller")
        finally:
            self._is_inside = False

    def _note(self, name: str, ranks: Iterable[int], reason: str | None) -> None:
        self.ranks.setdefault(name, set()).update(ranks)
        if reason is not None:
            self.reasons[name] = reason

    def _is_in_call(self) -> bool:
        """Whether the pipeline's own ``__call__`` is under way, which all ranks run."""
        frame = sys._getframe(1)
        while frame is not None and self._code is not None:
            if frame.f_code is self._code and frame.f_locals.get(self._code.co_varnames[0]) is self._pipe:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


class _SharedCall:
    """Stands in the place of an encoder's compiled call.

    Attributes:
        compiled: what was there before.
    """

    def __init__(self, encoders: SharedEncoders, name: str, index: int, model: torch.nn.Module, compiled: Any) -> None:
        self.compiled = compiled
        self._encoders, self._name, self._index, self._model = encoders, name, index, model

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the encoder."""
        run = self.compiled or self._model._call_impl
        return self._encoders.call(self._name, self._index, self._model, "", run, *args, **kwargs)


def _encoders_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The encoders of a pipeline by name, each once."""
    components = getattr(pipe, "components", None) or {}
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name in encoder_names(components):
        model = components[name]
        if isinstance(model, torch.nn.Module) and not hasattr(model, "_orig_mod"):  # of torch.compile(model)
            found.setdefault(id(model), (name, model))
    return dict(found.values())


def _reason_for_all(args: Any, kwargs: Any) -> str | None:
    """Why every rank has to make a call, by what all ranks know of it; None where one may make it for all."""
    if current_forward() is not None:
        return "a transformer calls it"
    for leaf in tree_flatten((args, kwargs))[0]:
        if not isinstance(leaf, (torch.Tensor, *PLAIN)):
            return f"a call gets an object that it may write to, {type(leaf).__name__}"
    return None
