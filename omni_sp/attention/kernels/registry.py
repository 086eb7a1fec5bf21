"""Kernels by name, and the choice of one."""

from __future__ import annotations

import importlib
import logging
from functools import cache, lru_cache

from torch import Tensor

from omni_sp.attention.kernels.base import AttentionArgs, Kernel, KernelCall, unsupported_reason
from omni_sp.attention.kernels.optional import is_installed
from omni_sp.attention.kernels.preference import compute_capability, preferred_kernels
from omni_sp.errors import UnsupportedAttentionError

_log = logging.getLogger(__name__)

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
_CHOOSING = ("auto", "tune")
_REGISTERED: dict[str, Kernel] = {}


def kernel_names() -> tuple[str, ...]:
    """The names that ``kernel=`` takes, those that choose among the others first.

    "auto" chooses by device and shape. "tune" times the exact kernels of this package once for each shape.
    """
    return (*_CHOOSING, *_LOCATIONS, *_REGISTERED)


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel of your own known by its name, in this process. It runs where it is named only.

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
    """The kernel called ``name``, which is one of ``kernel_names()`` that does not choose."""
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
    if name in _CHOOSING:
        return None
    kernel = load_kernel(name)
    if not kernel.modules or any(map(is_installed, kernel.modules)):
        return None
    return f"{' or '.join(kernel.modules)}, which is not installed: {kernel.install}"


@cache
def is_usable(name: str) -> bool:
    """Whether a kernel needs no package, or one that can be imported; a log line says why one cannot."""
    modules = load_kernel(name).modules
    for module in filter(is_installed, modules):
        try:
            importlib.import_module(module)
        except Exception as error:  # a binary for another torch or another GPU may raise anything
            _log.warning("the attention kernel %s is passed over: %s cannot be imported (%r)", name, module, error)
        else:
            return True
    return not modules


def exact_kernels() -> list[str]:
    """The kernels of this package that approximate nothing."""
    return [name for name in _LOCATIONS if not load_kernel(name).lossy]


def can_serve(name: str, call: KernelCall) -> bool:
    """Whether a kernel can serve a call here."""
    return unsupported_reason(load_kernel(name), call) is None and is_usable(name)


@lru_cache(maxsize=1024)
def _preferred_kernel(call: KernelCall) -> Kernel:
    for name in preferred_kernels(call):
        if can_serve(name, call):
            return load_kernel(name)
    raise UnsupportedAttentionError(f"no kernel can serve {call}; there are {', '.join(_LOCATIONS)}")


def select_kernel(name: str, call: KernelCall) -> Kernel:
    """The kernel of a name, or with "auto" the one that is preferred for the call, see ``preference``.

    With "tune" too, where nobody has timed any. Where the named one cannot serve the call, the error says why, and
    which kernels can.
    """
    if name in _CHOOSING:
        return _preferred_kernel(call)
    check_kernel(name)
    kernel = load_kernel(name)
    reason = unsupported_reason(kernel, call)
    if reason is not None:
        others = (*_LOCATIONS, *_REGISTERED)
        able = [other for other in others if unsupported_reason(load_kernel(other), call) is None]
        raise UnsupportedAttentionError(f"kernel {name!r} {reason}; able here: {', '.join(able) or 'none'}")
    return kernel


def kernel_call(query: Tensor, key_mask: Tensor | None, *, is_causal: bool, num_tokens: int) -> KernelCall:
    """What an attention of this query asks of a kernel; ``num_tokens`` is as in `KernelCall`."""
    device, head_dim = query.device, query.shape[-1]
    capability = compute_capability(device)
    return KernelCall(device.type, query.dtype, head_dim, key_mask is not None, is_causal, num_tokens, capability)


def attention_args(
    query: Tensor, key_mask: Tensor | None, *, is_causal: bool, scale: float | None, kernel: str, num_tokens: int
) -> AttentionArgs:
    """The arguments of one attention, with its kernel chosen; ``scale`` None becomes 1/sqrt(head_dim)."""
    call = kernel_call(query, key_mask, is_causal=is_causal, num_tokens=num_tokens)
    return AttentionArgs(select_kernel(kernel, call), query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
