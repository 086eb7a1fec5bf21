"""Hunyuan's transformers: DiT, HunyuanImage 2.1 and its refiner, HunyuanVideo, its 1.5, and FramePack."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _dit() -> Any:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=48,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=20,
        cross_attention_dim_t5=24,
        pooled_projection_dim=12,
        text_len=13,
        text_len_t5=9,
    )


def _dit_inputs() -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rope = get_2d_rotary_pos_embed(16, ((0, 0), (5, 7)), (5, 7), output_type="pt")
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": torch.tensor([501.0, 501.0]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "text_embedding_mask": key_mask((13, 5), 13).long(),
        "encoder_hidden_states_t5": draw(3, 2, 9, 24),
        "text_embedding_mask_t5": key_mask((4, 9), 9).long(),
        "image_meta_size": torch.tensor([[80.0, 112.0, 80.0, 112.0, 0.0, 0.0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": rope,
    }


def _dit_controlled() -> Inputs:
    return {**_dit_inputs(), "controlnet_block_samples": [draw(4, 2, 35, 48), draw(5, 2, 35, 48)]}


def _image() -> Any:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=20,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
        use_meanflow=True,
    )


def _image_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 5, 7),
        "timestep": torch.full((2,), 501.0),
        "timestep_r": torch.full((2,), 300.0),
        "guidance": torch.full((2,), 3250.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "encoder_hidden_states_2": draw(3, 2, 9, 12),
        "encoder_attention_mask_2": key_mask((4, 0), 9).long(),
    }


def _image_refiner() -> Any:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=8,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
    )


def _image_refiner_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 8, 3, 3, 5),
        "timestep": torch.full((2,), 501.0),
        "guidance": torch.full((2,), 3250.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
    }


def build_video(image_condition_type: str | None = None, in_channels: int = 4) -> Any:
    return transformer(
        "HunyuanVideoTransformer3DModel", in_channels=in_channels, image_condition_type=image_condition_type
    )


def _video_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "timestep": torch.full((2,), 501.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "pooled_projections": draw(3, 2, 12),
        "guidance": torch.full((2,), 6000.0),
    }


def build_video15(use_meanflow: bool = True, target_size: int = 640) -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=20,
        text_embed_2_dim=12,
        image_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        use_meanflow=use_meanflow,
        target_size=target_size,
    )


def _video15_inputs(image: float = 1.0) -> Inputs:
    return {
        "hidden_states": draw(1, 2, 9, 3, 3, 5),
        "timestep": torch.full((2,), 501.0),
        "timestep_r": torch.full((2,), 300.0),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "encoder_hidden_states_2": draw(3, 2, 9, 12),
        "encoder_attention_mask_2": key_mask((4, 0), 9).long(),
        "image_embeds": image * draw(4, 2, 7, 24),
    }


def _framepack() -> Any:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=24,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(batch: int = 2) -> Inputs:
    clean_first, history_4x, history_2x, clean_last, latents = torch.arange(23).split([1, 16, 2, 1, 3])
    return {
        "hidden_states": draw(1, batch, 4, 3, 6, 10),
        "timestep": torch.full((batch,), 501.0),
        "encoder_hidden_states": draw(2, batch, 13, 20),
        "encoder_attention_mask": key_mask((5, 13)[:batch], 13).long(),
        "pooled_projections": draw(3, batch, 12),
        "image_embeds": draw(4, batch, 7, 24),
        "indices_latents": latents,
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": draw(5, batch, 4, 2, 6, 10),
        "indices_latents_clean": torch.cat([clean_first, clean_last]),
        "latents_history_2x": draw(6, batch, 4, 2, 6, 10),
        "indices_latents_history_2x": history_2x,
        "latents_history_4x": draw(7, batch, 4, 16, 6, 10),
        "indices_latents_history_4x": history_4x,
    }


ENTRIES = [
    Entry("HunyuanDiT2DModel", _dit, _dit_inputs),
    Entry("HunyuanDiT2DModel", _dit, _dit_controlled, variant="controlnet"),
    Entry("HunyuanImageTransformer2DModel", _image, _image_inputs),
    Entry("HunyuanImageTransformer2DModel", _image_refiner, _image_refiner_inputs, variant="refiner"),
    Entry("HunyuanVideoTransformer3DModel", build_video, _video_inputs),
    Entry(
        "HunyuanVideoTransformer3DModel", lambda: build_video("token_replace"), _video_inputs, variant="token replace"
    ),
    Entry("HunyuanVideo15Transformer3DModel", build_video15, _video15_inputs),
    Entry("HunyuanVideo15Transformer3DModel", build_video15, lambda: _video15_inputs(0.0), variant="text to video"),
    Entry("HunyuanVideoFramepackTransformer3DModel", _framepack, _framepack_inputs),
    Entry("HunyuanVideoFramepackTransformer3DModel", _framepack, lambda: _framepack_inputs(1), variant="one sample"),
]
