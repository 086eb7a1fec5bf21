"""Kernels by name, and the choice of one."""

from __future__ import annotations

import importlib

from omni_sp.attention.kernels.base import Kernel, KernelCall, unsupported_reason
from omni_sp.attention.kernels.optional import is_installed
from omni_sp.errors import UnsupportedAttentionError

# Module and name of each kernel; "auto" takes the first that can serve a call. A module is imported when one of its
# kernels is first looked at, and a package that it wraps when that kernel first runs.
_LOCATIONS: dict[str, tuple[str, str]] = {
    "cpu_flash": ("omni_sp.attention.kernels.cpu_flash", "CPU_FLASH"),
    "cuda_flash": ("omni_sp.attention.kernels.cuda_torch", "CUDA_FLASH"),
    "cuda_cudnn": ("omni_sp.attention.kernels.cuda_torch", "CUDA_CUDNN"),
    "cuda_efficient": ("omni_sp.attention.kernels.cuda_torch", "CUDA_EFFICIENT"),
    "math": ("omni_sp.attention.kernels.math", "MATH"),
    "flash_attn_2": ("omni_sp.attention.kernels.flash_attn", "FLASH_ATTN_2"),
    "flash_attn_3": ("omni_sp.attention.kernels.flash_attn", "FLASH_ATTN_3"),
    "flash_attn_4": ("omni_sp.attention.kernels.flash_attn", "FLASH_ATTN_4"),
    "sage_lossy": ("omni_sp.attention.kernels.sage", "SAGE_LOSSY"),
}
_AUTO = ("cpu_flash", "cuda_flash", "cuda_cudnn", "cuda_efficient", "math")
_REGISTERED: dict[str, Kernel] = {}


def kernel_names() -> tuple[str, ...]:
    """All names that ``kernel=`` takes, "auto" first."""
    return ("auto", *_LOCATIONS, *_REGISTERED)


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel of your own known by its name, in this process. It runs where it is named, never by "auto".

    Raises:
        UnsupportedAttentionError: the name is taken.
    """
    if kernel.name in kernel_names():
        raise UnsupportedAttentionError(
            f"there is an attention kernel {kernel.name!r} already: give yours another name"
        )
    _REGISTERED[kernel.name] = kernel


def _load(name: str) -> Kernel:
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, attribute = _LOCATIONS[name]
    kernel: Kernel = getattr(importlib.import_module(module), attribute)
    return kernel


def missing_package(name: str) -> str | None:
    """What the kernel called ``name`` needs and is not installed, and how to install it; None where it lacks nothing.

    Nothing is imported for it, so that a process which will not run the kernel can tell.
    """
    if name == "auto":
        return None
    kernel = _load(name)
    if not kernel.modules or any(map(is_installed, kernel.modules)):
        return None
    return f"{' or '.join(kernel.modules)}, which is not installed: {kernel.install}"


def select_kernel(name: str, call: KernelCall) -> Kernel:
    """The kernel called ``name``, or with "auto" the first in order of preference that can serve ``call``.

    Raises:
        UnsupportedAttentionError: no such name, or it cannot serve the call; says why, and which kernels can.
    """
    if name == "auto":
        for candidate in map(_load, _AUTO):
            if unsupported_reason(candidate, call) is None:
                return candidate
        raise UnsupportedAttentionError(f"no kernel can serve {call}; there are {', '.join(_AUTO)}")
    if name not in kernel_names():
        raise UnsupportedAttentionError(
            f"no attention kernel is called {name!r}; choose from {', '.join(kernel_names())}"
        )
    kernel = _load(name)
    why = unsupported_reason(kernel, call)
    if why is not None:
        able = [other for other in kernel_names()[1:] if unsupported_reason(_load(other), call) is None]
        raise UnsupportedAttentionError(f"kernel {name!r} {why}; able here: {', '.join(able) or 'none'}")
    return kernel
