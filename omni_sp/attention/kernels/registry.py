"""Kernels by name, and the choice of one."""

from __future__ import annotations

import importlib

from omni_sp.attention.kernels.base import Kernel, KernelCall, refusal
from omni_sp.errors import UnsupportedAttentionError

# In order of preference: module and name. A module is imported when one of its kernels is first looked at, so that
# optional packages stay optional.
_PLACES: dict[str, tuple[str, str]] = {
    "cpu_flash": ("omni_sp.attention.kernels.cpu_flash", "CPU_FLASH"),
    "cuda_flash": ("omni_sp.attention.kernels.cuda_torch", "CUDA_FLASH"),
    "cuda_cudnn": ("omni_sp.attention.kernels.cuda_torch", "CUDA_CUDNN"),
    "cuda_efficient": ("omni_sp.attention.kernels.cuda_torch", "CUDA_EFFICIENT"),
    "math": ("omni_sp.attention.kernels.math", "MATH"),
}


def kernel_names() -> tuple[str, ...]:
    """All names that ``kernel=`` takes, "auto" first."""
    return ("auto", *_PLACES)


def _load(name: str) -> Kernel:
    module, attribute = _PLACES[name]
    kernel: Kernel = getattr(importlib.import_module(module), attribute)
    return kernel


def select_kernel(name: str, call: KernelCall) -> Kernel:
    """The kernel called ``name``, or with "auto" the first in order of preference that can serve ``call``.

    Raises:
        UnsupportedAttentionError: no such name, or it cannot serve the call; says why, and which kernels can.
    """
    if name == "auto":
        for candidate in map(_load, _PLACES):
            if refusal(candidate, call) is None:
                return candidate
        raise UnsupportedAttentionError(f"no kernel can serve {call}; there are {', '.join(_PLACES)}")
    if name not in _PLACES:
        raise UnsupportedAttentionError(f"no attention kernel {name!r}; choose from {', '.join(kernel_names())}")
    kernel = _load(name)
    why = refusal(kernel, call)
    if why is not None:
        able = [other for other in _PLACES if refusal(_load(other), call) is None]
        raise UnsupportedAttentionError(f"kernel {name!r} {why}; able here: {', '.join(able) or 'none'}")
    return kernel
