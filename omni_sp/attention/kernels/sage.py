"""SageAttention computes with query and key in 8 bits: fast, and *not exact*. It runs only where it is named."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels.base import Capabilities, Kernel
from omni_sp.attention.kernels.optional import optional_function

_DEVICES, _DTYPES = frozenset({"cuda"}), frozenset({torch.bfloat16, torch.float16})
_MODULES, _INSTALL = ("sageattention",), "install SageAttention 2 from its source"


def _run(
    query: Tensor, key: Tensor, value: Tensor, _no_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    # Version 1, which is the one on PyPI, returns no LSE.
    function = optional_function(_MODULES, "sageattn", _INSTALL)
    out, lse = function(query, key, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale, return_lse=True)
    return out, lse


SAGE_LOSSY = Kernel(
    "sage_lossy",
    Capabilities(_DEVICES, _DTYPES, causal=True, gqa=True, max_head_dim=128, head_dim_multiple=8),
    _run,
    lossy=True,
    modules=_MODULES,
    install=_INSTALL,
)
