"""The attention core: tensors in, tensors out, exact for every shape; knows no model."""

from omni_sp.attention.entry import agree_on_layout, local_attention, sequence_parallel_attention
from omni_sp.attention.kernels import Capabilities, Kernel, kernel_names, register_kernel
from omni_sp.attention.layout import SequenceLayout, shares

__all__ = [
    "Capabilities",
    "Kernel",
    "SequenceLayout",
    "agree_on_layout",
    "kernel_names",
    "local_attention",
    "register_kernel",
    "sequence_parallel_attention",
    "shares",
]
