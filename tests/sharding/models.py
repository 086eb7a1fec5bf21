"""Tiny transformers of each family with random, non-degenerate weights, and inputs of awkward sizes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_sp.testing.components import transformer

Inputs = dict[str, Any]


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def qwen_image(heads: int = 3) -> Any:
    """Qwen-Image's, with channels as FLUX has them."""
    return transformer(
        "QwenImageTransformer2DModel",
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_inputs(
    *, height: int = 5, width: int = 7, text: int = 13, lengths: tuple[int, ...] | None = None, batch: int = 1
) -> Inputs:
    """``height`` × ``width`` picture tokens; ``lengths``: valid text tokens of each sample, as a mask."""
    generator = torch.Generator().manual_seed(1)
    batch = batch if lengths is None else len(lengths)
    mask = None
    if lengths is not None:
        mask = torch.stack([torch.arange(text) < length for length in lengths])
    return {
        "hidden_states": _draw(generator, batch, height * width, 16),
        "encoder_hidden_states": _draw(generator, batch, text, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.6),
        "img_shapes": [[(1, height, width)]] * batch,
        "return_dict": False,
    }


def flux() -> Any:
    return transformer("FluxTransformer2DModel")


def flux_inputs(*, height: int = 5, width: int = 7, text: int = 13, batch: int = 2, ids_ndim: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    txt_ids = torch.zeros(text, 3)
    return {
        "hidden_states": _draw(generator, batch, height * width, 16),
        "encoder_hidden_states": _draw(generator, batch, text, 24),
        "pooled_projections": _draw(generator, batch, 20),
        "timestep": torch.full((batch,), 0.6),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": img_ids if ids_ndim == 2 else img_ids[None],
        "txt_ids": txt_ids if ids_ndim == 2 else txt_ids[None],
        "return_dict": False,
    }


def flux_controlnet_inputs() -> Inputs:
    """With residuals as a ControlNet gives them: replicated, one per block."""
    inputs = flux_inputs()
    generator = torch.Generator().manual_seed(3)
    inputs["controlnet_block_samples"] = [_draw(generator, 2, 35, 48) for _ in range(2)]
    inputs["controlnet_single_block_samples"] = [_draw(generator, 2, 35, 48) for _ in range(2)]
    return inputs


def qwen_controlnet_inputs() -> Inputs:
    inputs = qwen_inputs()
    inputs["controlnet_block_samples"] = [_draw(torch.Generator().manual_seed(3), 1, 35, 48)]
    return inputs


def wan(image: bool = False) -> Any:
    changes = {"image_dim": 28, "added_kv_proj_dim": 72} if image else {}
    return transformer("WanTransformer3DModel", **changes)


def wan_inputs(*, frames: int = 3, height: int = 6, width: int = 10, text: int = 13, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": _draw(generator, batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 600),
        "encoder_hidden_states": _draw(generator, batch, text, 20),
        "return_dict": False,
    }


def wan_ti2v_inputs() -> Inputs:
    """A timestep of its own for each token (Wan 2.2 TI2V)."""
    inputs = wan_inputs()
    inputs["timestep"] = torch.randint(0, 1000, (2, 45), generator=torch.Generator().manual_seed(5))
    return inputs


def wan_i2v_inputs() -> Inputs:
    inputs = wan_inputs(text=512)
    inputs["encoder_hidden_states_image"] = _draw(torch.Generator().manual_seed(6), 2, 11, 28)
    return inputs


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Inputs]]] = {
    "qwen, 13 text tokens": (qwen_image, qwen_inputs),
    "qwen, 3 text tokens": (qwen_image, lambda: qwen_inputs(text=3)),
    "qwen, two prompts": (qwen_image, lambda: qwen_inputs(lengths=(13, 5))),
    "qwen, one short prompt, 2 tokens": (qwen_image, lambda: qwen_inputs(text=3, lengths=(1, 3))),
    "qwen, 1000x1016 pixels": (qwen_image, lambda: qwen_inputs(height=62, width=63)),
    "qwen, 5 heads": (lambda: qwen_image(heads=5), lambda: qwen_inputs(batch=2)),
    "qwen, controlnet": (qwen_image, qwen_controlnet_inputs),
    "flux, 13 text tokens": (flux, flux_inputs),
    "flux, 3 text tokens": (flux, lambda: flux_inputs(text=3, batch=1)),
    "flux, ids with batch": (flux, lambda: flux_inputs(ids_ndim=3)),
    "flux, controlnet": (flux, flux_controlnet_inputs),
    "wan": (wan, wan_inputs),
    "wan, 1 frame": (wan, lambda: wan_inputs(frames=1, height=2, width=6)),
    "wan, timestep per token": (wan, wan_ti2v_inputs),
    "wan, image to video": (lambda: wan(image=True), wan_i2v_inputs),
}
