"""Kernels by name, and the choice of one."""

from __future__ import annotations

import importlib

from torch import Tensor

from omni_sp.attention.kernels.base import AttentionArgs, Kernel, KernelCall, unsupported_reason
from omni_sp.attention.kernels.optional import is_installed
from omni_sp.errors import UnsupportedAttentionError

# Module and name of each kernel. A module is imported when one of its kernels is first looked at, and a package that it
# wraps when that kernel first runs.
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
    """The names that ``kernel=`` takes, "auto" first."""
    return ("auto", *_LOCATIONS, *_REGISTERED)


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel of your own known by its name, in this process. It runs where it is named, never by "auto".

    Args:
        kernel: the kernel; its name must be new.

    Raises:
        UnsupportedAttentionError: the name is taken.
    """
    if kernel.name in kernel_names():
        raise UnsupportedAttentionError(
            f"there is an attention kernel {kernel.name!r} already: give yours another name"
        )
    _REGISTERED[kernel.name] = kernel


def load_kernel(name: str) -> Kernel:
    """The kernel called ``name``, which is one of ``kernel_names()`` other than "auto"."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, attribute = _LOCATIONS[name]
    kernel: Kernel = getattr(importlib.import_module(module), attribute)
    return kernel


def check_kernel(name: str) -> None:
    """Raise where there is no such kernel.

    Args:
        name: what the user calls it.

    Raises:
        UnsupportedAttentionError: there is none; the message lists the names.
    """
    if name not in kernel_names():
        raise UnsupportedAttentionError(
            f"no attention kernel is called {name!r}; choose from {', '.join(kernel_names())}"
        )


def missing_package(name: str) -> str | None:
    """What a kernel needs and is not installed, for a message. The package itself is not imported.

    Args:
        name: of the kernel, one of ``kernel_names()``.

    Returns:
        The missing package and how to install it; None where nothing is missing.
    """
    if name == "auto":
        return None
    kernel = load_kernel(name)
    if not kernel.modules or any(map(is_installed, kernel.modules)):
        return None
    return f"{' or '.join(kernel.modules)}, which is not installed: {kernel.install}"


def select_kernel(name: str, call: KernelCall) -> Kernel:
    """The kernel of a name, or with "auto" the first in order of preference that can serve the call.

    Where the named one cannot, the error says why, and which kernels can.
    """
    if name == "auto":
        for candidate in map(load_kernel, _AUTO):
            if unsupported_reason(candidate, call) is None:
                return candidate
        raise UnsupportedAttentionError(f"no kernel can serve {call}; there are {', '.join(_AUTO)}")
    check_kernel(name)
    kernel = load_kernel(name)
    reason = unsupported_reason(kernel, call)
    if reason is not None:
        able = [other for other in kernel_names()[1:] if unsupported_reason(load_kernel(other), call) is None]
        raise UnsupportedAttentionError(f"kernel {name!r} {reason}; able here: {', '.join(able) or 'none'}")
    return kernel


def attention_args(
    query: Tensor, key_mask: Tensor | None, *, is_causal: bool, scale: float | None, kernel: str
) -> AttentionArgs:
    """The arguments of one attention, with its kernel chosen; ``scale`` None becomes 1/sqrt(head_dim)."""
    call = KernelCall(query.device.type, query.dtype, query.shape[-1], key_mask is not None, is_causal)
    return AttentionArgs(select_kernel(kernel, call), query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
