"""Attention on one device, a kernel a file; all give (output, log-sum-exp) and declare what they can do."""

from omni_sp.attention.kernels.base import Capabilities, Kernel, KernelCall, attend
from omni_sp.attention.kernels.registry import kernel_names, missing_package, register_kernel, select_kernel

__all__ = [
    "Capabilities",
    "Kernel",
    "KernelCall",
    "attend",
    "kernel_names",
    "missing_package",
    "register_kernel",
    "select_kernel",
]
