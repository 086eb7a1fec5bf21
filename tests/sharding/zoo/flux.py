"""Flux and the pictures' transformers built like it: two streams of blocks, then one, with ids for rotary positions."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS, transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask

HEIGHT, WIDTH, TEXT = 5, 7, 13
TOKENS = HEIGHT * WIDTH
HIDDEN = 48
"""3 heads of 16."""

_FLUX = TRANSFORMERS["FluxTransformer2DModel"]
_ROPE = _FLUX["axes_dims_rope"]
_OWN = ("pooled_projection_dim", "guidance_embeds", "axes_dims_rope")
_SIZES = {name: value for name, value in _FLUX.items() if name not in _OWN}


def _img_ids(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def _streams() -> Inputs:
    """What all of them take."""
    return {
        "hidden_states": draw(1, 2, TOKENS, 16),
        "encoder_hidden_states": draw(2, 2, TEXT, 24),
        "timestep": torch.full((2,), 0.6),
        "img_ids": _img_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _residuals() -> Inputs:
    """As a ControlNet gives them: replicated, one for each block."""
    return {
        "controlnet_block_samples": [draw(5, 2, TOKENS, HIDDEN), draw(6, 2, TOKENS, HIDDEN)],
        "controlnet_single_block_samples": [draw(7, 2, TOKENS, HIDDEN), draw(8, 2, TOKENS, HIDDEN)],
    }


def _flux() -> Any:
    return transformer("FluxTransformer2DModel")


def _flux_inputs() -> Inputs:
    return {**_streams(), "pooled_projections": draw(3, 2, 20), "guidance": torch.full((2,), 3.5)}


def with_ip_adapter(model: Any) -> Any:
    """As ``load_ip_adapter`` leaves a model."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(HIDDEN, 24, num_tokens=(3,), scale=[0.7]))
    projection = ImageProjection(image_embed_dim=28, cross_attention_dim=24, num_image_text_embeds=3)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return model


def ip_adapter_inputs() -> Inputs:
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [draw(9, 2, 1, 28)]}}


def _chroma() -> Any:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        **_SIZES,
        axes_dims_rope=_ROPE,
        approximator_num_channels=16,
        approximator_hidden_dim=20,
        approximator_layers=2,
    )


def _chroma_inputs() -> Inputs:
    # The pipeline's mask is a number for each token, not a truth: the text's 0 or 1, and 1 for the picture's.
    mask = torch.cat([key_mask((TEXT, 5), TEXT).float(), torch.ones(2, TOKENS, dtype=torch.bool)], dim=1)
    return {**_streams(), "attention_mask": mask}


def _bria() -> Any:
    from diffusers import BriaTransformer2DModel

    return BriaTransformer2DModel(**_SIZES, axes_dims_rope=list(_ROPE))


def _bria_inputs() -> Inputs:
    return {**_streams(), "timestep": torch.full((2,), 600.0)}


def _bria_residuals() -> Inputs:
    """For its single blocks the class wants residuals of the picture's tokens behind the text's number of them."""
    single = [draw(7, 2, TOKENS - TEXT, HIDDEN), draw(8, 2, TOKENS - TEXT, HIDDEN)]
    return {**_residuals(), "controlnet_single_block_samples": single}


def _fibo() -> Any:
    from diffusers import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel(**_SIZES, axes_dims_rope=list(_ROPE), text_encoder_dim=20)


def _fibo_inputs() -> Inputs:
    mask = torch.cat([key_mask((TEXT, 5), TEXT), torch.ones(2, TOKENS, dtype=torch.bool)], dim=1)
    return {
        **_bria_inputs(),
        "text_encoder_layers": [draw(10 + layer, 2, TEXT, 20) for layer in range(4)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
    }


def _longcat() -> Any:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(**_SIZES, pooled_projection_dim=20, axes_dims_rope=list(_ROPE))


def _longcat_inputs() -> Inputs:
    """The pipeline numbers the modality first: 0 for text, 1 for the picture, whose positions begin behind the text."""
    txt_ids = torch.stack([torch.zeros(TEXT), torch.arange(TEXT), torch.arange(TEXT)], dim=-1)
    img_ids = _img_ids() + torch.tensor([1.0, TEXT, TEXT])
    return {**_streams(), "txt_ids": txt_ids, "img_ids": img_ids, "guidance": None}


def _longcat_edit_inputs() -> Inputs:
    """With the tokens of a picture to edit behind those of the new one."""
    ids = _longcat_inputs()["img_ids"]
    edited = _img_ids(3, 5) + torch.tensor([2.0, TEXT, TEXT])
    return {
        **_longcat_inputs(),
        "hidden_states": draw(1, 2, TOKENS + 15, 16),
        "img_ids": torch.cat([ids, edited]),
    }


def _ovis() -> Any:
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(**_SIZES, out_channels=12, axes_dims_rope=_ROPE)


def _ovis_inputs() -> Inputs:
    return _streams()


ENTRIES = [
    Entry("FluxTransformer2DModel", _flux, _flux_inputs),
    Entry("FluxTransformer2DModel", _flux, lambda: {**_flux_inputs(), **_residuals()}, "controlnet"),
    Entry(
        "FluxTransformer2DModel",
        lambda: with_ip_adapter(_flux()),
        lambda: {**_flux_inputs(), **ip_adapter_inputs()},
        "IP adapter",
    ),
    Entry("ChromaTransformer2DModel", _chroma, _chroma_inputs),
    Entry("ChromaTransformer2DModel", _chroma, lambda: {**_streams(), **_residuals()}, "controlnet"),
    Entry(
        "ChromaTransformer2DModel",
        lambda: with_ip_adapter(_chroma()),
        lambda: {**_chroma_inputs(), **ip_adapter_inputs()},
        "IP adapter",
    ),
    Entry("BriaTransformer2DModel", _bria, _bria_inputs),
    Entry("BriaTransformer2DModel", _bria, lambda: {**_bria_inputs(), **_bria_residuals()}, "controlnet"),
    Entry("BriaFiboTransformer2DModel", _fibo, _fibo_inputs),
    Entry("LongCatImageTransformer2DModel", _longcat, _longcat_inputs),
    Entry("LongCatImageTransformer2DModel", _longcat, _longcat_edit_inputs, "edit"),
    Entry("OvisImageTransformer2DModel", _ovis, _ovis_inputs),
]
