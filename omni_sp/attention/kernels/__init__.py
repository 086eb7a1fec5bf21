"""Attention on one device, a kernel a file; all give (output, log-sum-exp) and declare what they can do."""

from omni_sp.attention.kernels.base import (
    AttentionArgs,
    Capabilities,
    Kernel,
    KernelCall,
    KeyBlock,
    Rows,
    attend,
    select_keys,
)
from omni_sp.attention.kernels.registry import (
    attention_args,
    can_serve,
    check_kernel,
    exact_kernels,
    kernel_call,
    kernel_names,
    load_kernel,
    missing_package,
    register_kernel,
    select_kernel,
)

__all__ = [
    "AttentionArgs",
    "Capabilities",
    "Kernel",
    "KernelCall",
    "KeyBlock",
    "Rows",
    "attend",
    "attention_args",
    "can_serve",
    "check_kernel",
    "exact_kernels",
    "kernel_call",
    "kernel_names",
    "load_kernel",
    "missing_package",
    "register_kernel",
    "select_kernel",
    "select_keys",
]
