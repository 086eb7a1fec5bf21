"""SageAttention: query and key in 8 bits. Fast, and *not exact*: chosen by name only."""

from __future__ import annotations

import torch

from omni_sp.attention.kernels.base import Capabilities, Kernel
from omni_sp.attention.kernels.optional import optional_function

_MODULES, _INSTALL = ("sageattention",), "install SageAttention 2 from its source"


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _no_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Version 1, which is what PyPI has, gives no LSE.
    function = optional_function(_MODULES, "sageattn", _INSTALL)
    out, lse = function(query, key, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale, return_lse=True)
    return out, lse


SAGE_LOSSY = Kernel(
    "sage_lossy",
    Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        causal=True,
        gqa=True,
        max_head_dim=128,
        head_dim_multiple=8,
    ),
    _run,
    lossy=True,
    modules=_MODULES,
    install=_INSTALL,
)
