"""CogVideoX in its three generations, and ConsisID, which adds a face to it."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS, transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _rotary(grid: tuple[int, int], frames: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=16, crops_coords=((0, 0), grid), grid_size=grid, temporal_size=frames, **options
    )
    return cos, sin


def build_first() -> Any:
    return transformer("CogVideoXTransformer3DModel")


def _inputs_first() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 3, 4, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([999, 301]),
    }


def build_rotary() -> Any:
    # The picture's latents lie beside the video's as further channels; positions are learned besides.
    return transformer(
        "CogVideoXTransformer3DModel",
        in_channels=8,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )


def _inputs_rotary() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 3, 8, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([999, 301]),
        "image_rotary_emb": _rotary((3, 5), 3),
    }


def build_second() -> Any:
    return transformer(
        "CogVideoXTransformer3DModel",
        in_channels=8,
        patch_size_t=2,
        ofs_embed_dim=12,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )


def _inputs_second() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 6, 8, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.tensor([999, 301]),
        "ofs": torch.full((1,), 2.0),
        "image_rotary_emb": _rotary((3, 5), 3, grid_type="slice", max_size=(3, 5)),
    }


def _build_consisid() -> Any:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        **{**TRANSFORMERS["CogVideoXTransformer3DModel"], "in_channels": 8},
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
        is_train_face=True,
        is_kps=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=3,
        LFE_id_dim=14,
        LFE_vit_dim=12,
        LFE_depth=2,
        LFE_dim_head=4,
        LFE_num_heads=3,
        LFE_num_id_token=3,
        LFE_num_querie=5,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )


def _inputs_consisid() -> Inputs:
    return {
        **_inputs_rotary(),
        "id_cond": draw(5, 2, 14),
        "id_vit_hidden": [draw(6, 2, 7, 12), draw(7, 2, 7, 12)],
    }


def _build_consisid_without_face() -> Any:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(**TRANSFORMERS["CogVideoXTransformer3DModel"])


ENTRIES = [
    Entry("CogVideoXTransformer3DModel", build_first, _inputs_first),
    Entry("CogVideoXTransformer3DModel", build_rotary, _inputs_rotary, variant="rotary and a picture"),
    Entry("CogVideoXTransformer3DModel", build_second, _inputs_second, variant="patches in time and an offset"),
    Entry("ConsisIDTransformer3DModel", _build_consisid, _inputs_consisid),
    Entry("ConsisIDTransformer3DModel", _build_consisid_without_face, _inputs_first, variant="without a face"),
]
