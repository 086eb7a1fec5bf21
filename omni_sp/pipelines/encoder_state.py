"""What one rank alone knows of an encoder: who looks on while it runs, and whether somebody has changed it."""

from __future__ import annotations

import torch

from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.sharding.foreign_code import has_foreign_forward, has_foreign_hooks, has_global_hooks

OWN_REASONS = ("code of others runs around it", "gradients are enabled (torch.no_grad() ends that)")
"""Why a rank has to make a call itself, for which it looks at what other ranks may not have."""
CHANGED = 1 << len(OWN_REASONS)
"""The flag of an encoder that has changed."""
BITS = len(OWN_REASONS) + 1
_KNOWN_HOOKS = ("transformers.", "accelerate.")
"""Whose hooks look at one call, or move its tensors."""


class EncoderState:
    """What a rank alone knows of an encoder.

    Args:
        model: the encoder.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._looks = _looks(model)

    def reason(self) -> str | None:
        """Why this rank has to make the encoder's calls, whatever other ranks have: one of OWN_REASONS, or None."""
        if _is_watched(self._model):
            return OWN_REASONS[0]
        # Whoever lets a model go without gradients has had its weights read.
        has_gradients = has_unread_weights(self._model) or any(one.requires_grad for one in self._model.parameters())
        return OWN_REASONS[1] if torch.is_grad_enabled() and has_gradients else None

    def flags(self) -> int:
        """A bit for the reason, and CHANGED where its weights have other dtypes or shapes than when this was asked."""
        reason, before = self.reason(), self._looks
        self._looks = _looks(self._model)
        return (0 if reason is None else 1 << OWN_REASONS.index(reason)) | (0 if self._looks == before else CHANGED)


def _looks(model: torch.nn.Module) -> object:
    """What the shapes and dtypes of an encoder's results follow from, beside its inputs."""
    return [(name, weight.dtype, weight.shape) for name, weight in model.named_parameters()]


def _is_watched(model: torch.nn.Module) -> bool:
    """Whether somebody looks on while an encoder runs."""
    # Who puts something on a part of it has had its weights read, on every rank.
    parts = [model] if has_unread_weights(model) else model.modules()
    return has_global_hooks() or any(map(_has_code_of_others, parts))


def _has_code_of_others(module: torch.nn.Module) -> bool:
    if has_foreign_hooks(module, known=_KNOWN_HOOKS):
        return True
    forward = vars(module).get("forward")
    is_ours = str(getattr(forward, "__globals__", {}).get("__name__")).startswith("omni_sp.")  # a clock
    return forward is not None and not is_ours and has_foreign_forward(module, of_diffusers=False)
