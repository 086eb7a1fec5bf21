"""The flash-attn packages: FlashAttention-2, -3 (Hopper) and -4 (CuTe). Each is imported when its kernel first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_sp.attention.kernels.base import Capabilities, Kernel
from omni_sp.attention.kernels.optional import optional_function


def _kernel(name: str, max_head_dim: int, modules: tuple[str, ...], install: str, lse_option: str) -> Kernel:
    """A kernel of one of the packages, which returns (output, LSE, …) where the option ``lse_option`` is true."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, _no_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        function = optional_function(modules, "flash_attn_func", install)
        out, lse, *_ = function(query, key, value, softmax_scale=scale, causal=is_causal, **{lse_option: True})
        return out, lse

    devices, dtypes = frozenset({"cuda"}), frozenset({torch.bfloat16, torch.float16})
    capabilities = Capabilities(devices, dtypes, causal=True, gqa=True, max_head_dim=max_head_dim, head_dim_multiple=8)
    return Kernel(name, capabilities, run, modules=modules, install=install)


FLASH_ATTN_2 = _kernel("flash_attn_2", 256, ("flash_attn",), "pip install flash-attn", "return_attn_probs")
# The wheel and a build from source install modules of different names.
FLASH_ATTN_3 = _kernel(
    "flash_attn_3", 256, ("flash_attn_interface", "fa3_fwd_interface"), "pip install fa3-fwd", "return_attn_probs"
)
FLASH_ATTN_4 = _kernel("flash_attn_4", 128, ("flash_attn.cute",), "pip install flash-attn-4", "return_lse")
