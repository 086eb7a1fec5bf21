"""The attention core: tensors in, tensors out, exact for every shape. It does not depend on any model."""

from omni_sp.attention.entry import agree_on_layout, local_attention, sequence_parallel_attention
from omni_sp.attention.kernels import Capabilities, Kernel, check_kernel, kernel_names, missing_package, register_kernel
from omni_sp.attention.key_mask import WholeKeyMask
from omni_sp.attention.layout import SequenceLayout, split_evenly
from omni_sp.attention.strategy import STRATEGIES, Strategy, check_strategy, select_strategy
from omni_sp.attention.tuning import TunedShape, tuned_kernels

__all__ = [
    "STRATEGIES",
    "Capabilities",
    "Kernel",
    "SequenceLayout",
    "Strategy",
    "TunedShape",
    "WholeKeyMask",
    "agree_on_layout",
    "check_kernel",
    "check_strategy",
    "kernel_names",
    "local_attention",
    "missing_package",
    "register_kernel",
    "select_strategy",
    "sequence_parallel_attention",
    "split_evenly",
    "tuned_kernels",
]
