"""Allegro."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=36,
        sample_height=6,
        sample_width=10,
        sample_frames=3,
        caption_channels=20,
    )


def _rotary(frames: int, height: int, width: int) -> tuple[Any, Any]:
    """As its pipeline makes them: frequencies of each axis, and each token's position on it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    along_t, along_h, along_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    positions = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    positions = positions.reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1).contiguous()
    return (along_t, along_h, along_w), tuple(positions)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "timestep": torch.tensor([999, 301]),
        "image_rotary_emb": _rotary(3, 3, 5),
    }


def _inputs_masked() -> Inputs:
    mask = torch.ones(2, 3, 6, 10)
    mask[1, :, :, 4:] = 0
    return {**_inputs(), "attention_mask": mask}


ENTRIES = [
    Entry("AllegroTransformer3DModel", _build, _inputs),
    Entry("AllegroTransformer3DModel", _build, _inputs_masked, variant="a part of the picture masked"),
]
