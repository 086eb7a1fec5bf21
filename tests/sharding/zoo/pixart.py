"""DiT and what descends from it: PixArt, Latte, and the class that was once all of them."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=10,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _inputs_dit() -> Inputs:
    # It knows squares only.
    return {
        "hidden_states": draw(1, 2, 4, 10, 10),
        "timestep": torch.tensor([999, 301]),
        "class_labels": torch.tensor([3, 10]),
    }


def _build_pixart(sample_size: int = 16) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=10,
        caption_channels=20,
    )


def _build_pixart_sized() -> Any:
    return _build_pixart(sample_size=128)


def _inputs_pixart() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "timestep": torch.tensor([999, 301]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _inputs_pixart_sized() -> Inputs:
    sizes = {"resolution": torch.tensor([[80.0, 112.0]]).repeat(2, 1), "aspect_ratio": torch.full((2, 1), 80 / 112)}
    return {**_inputs_pixart(), "added_cond_kwargs": sizes}


def _build_latte() -> Any:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=10,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=20,
        video_length=3,
    )


def _inputs_latte() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([999, 301]),
        "enable_temporal_attentions": True,
    }


def _inputs_latte_pictures() -> Inputs:
    return {**_inputs_latte(), "enable_temporal_attentions": False}


def _build_continuous() -> Any:
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=12, num_layers=2, norm_num_groups=3,
        cross_attention_dim=20,
    )  # fmt: skip


def _inputs_continuous() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 12, 5, 7),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
    }


def _build_linear() -> Any:
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=12, num_layers=2, norm_num_groups=3,
        use_linear_projection=True, only_cross_attention=True, cross_attention_dim=20,
    )  # fmt: skip


def _inputs_linear() -> Inputs:
    return {"hidden_states": draw(1, 2, 12, 5, 7), "encoder_hidden_states": draw(2, 2, 13, 20)}


def _build_vectorized() -> Any:
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, sample_size=5, num_vector_embeds=11,
        num_embeds_ada_norm=1000, norm_type="ada_norm", attention_bias=True, cross_attention_dim=20,
    )  # fmt: skip


def _inputs_vectorized() -> Inputs:
    return {
        "hidden_states": torch.arange(50).reshape(2, 25) * 7 % 11,
        "encoder_hidden_states": draw(2, 2, 13, 20),
        # One number for all samples, as its scheduler has it.
        "timestep": torch.tensor(40),
    }


def _build_patches() -> Any:
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=10,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip


ENTRIES = [
    Entry("DiTTransformer2DModel", _build_dit, _inputs_dit),
    Entry("PixArtTransformer2DModel", _build_pixart, _inputs_pixart),
    Entry("PixArtTransformer2DModel", _build_pixart_sized, _inputs_pixart_sized, variant="told its size"),
    Entry("LatteTransformer3DModel", _build_latte, _inputs_latte),
    Entry("LatteTransformer3DModel", _build_latte, _inputs_latte_pictures, variant="frames alone"),
    Entry("Transformer2DModel", _build_continuous, _inputs_continuous),
    Entry("Transformer2DModel", _build_linear, _inputs_linear, variant="linear, cross-attention only"),
    Entry("Transformer2DModel", _build_vectorized, _inputs_vectorized, variant="of codes"),
    Entry("Transformer2DModel", _build_patches, _inputs_dit, variant="of patches"),
]
