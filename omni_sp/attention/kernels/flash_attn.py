"""The flash-attn packages: FlashAttention-2, -3 (Hopper) and -4 (CuTe). Each is imported when its kernel first runs."""

from __future__ import annotations

import torch

from omni_sp.attention.kernels.base import Capabilities, Kernel, Run
from omni_sp.attention.kernels.optional import optional_function


def _capabilities(max_head_dim: int) -> Capabilities:
    return Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        causal=True,
        gqa=True,
        max_head_dim=max_head_dim,
        head_dim_multiple=8,
    )


def _runner(modules: tuple[str, ...], install: str, lse_option: str) -> Run:
    """All three take (batch, tokens, heads, head_dim) and give (output, LSE, …) where ``lse_option`` asks for it."""

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _no_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = optional_function(modules, "flash_attn_func", install)
        out, lse, *_ = function(query, key, value, softmax_scale=scale, causal=is_causal, **{lse_option: True})
        return out, lse

    return run


def _kernel(name: str, max_head_dim: int, modules: tuple[str, ...], install: str, lse_option: str) -> Kernel:
    run = _runner(modules, install, lse_option)
    return Kernel(name, _capabilities(max_head_dim), run, modules=modules, install=install)


FLASH_ATTN_2 = _kernel("flash_attn_2", 256, ("flash_attn",), "pip install flash-attn", "return_attn_probs")
# The wheel and a build from source install under different names.
FLASH_ATTN_3 = _kernel(
    "flash_attn_3", 256, ("flash_attn_interface", "fa3_fwd_interface"), "pip install fa3-fwd", "return_attn_probs"
)
FLASH_ATTN_4 = _kernel("flash_attn_4", 128, ("flash_attn.cute",), "pip install flash-attn-4", "return_lse")
