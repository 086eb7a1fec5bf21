"""Sana for videos: linear attention with positions, and the world model with its gated recurrence over frames."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=12,
        cross_attention_dim=36,
        caption_channels=20,
        rope_max_seq_len=32,
    )


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
        "timestep": draw(3, 2).abs() * 100,
    }


def _picture_inputs() -> Inputs:
    # Tokens of the given first frame are at time 0.
    timestep = torch.full((2, 1, 3, 3, 5), 300.0)
    timestep[:, :, 0] = 0
    return _inputs() | {"timestep": timestep}


def _build_world(**more: Any) -> Any:
    from diffusers import SanaWMTransformer3DModel

    return SanaWMTransformer3DModel(
        **{
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "linear_head_dim": 16,
            "softmax_every_n": 0,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
            "caption_channels": 20,
            "mlp_ratio": 2.0,
            **more,
        }
    )


def _build_world_softmax() -> Any:
    return _build_world(softmax_every_n=2)


def _cameras(frames: int, height: int, width: int) -> torch.Tensor:
    """(1, frames, 20): poses that turn and move a little, flat, and focal lengths and centres in latent pixels."""
    angle = 0.1 * torch.arange(frames)
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 0, 0] = poses[:, 2, 2] = angle.cos()
    poses[:, 0, 2], poses[:, 2, 0] = angle.sin(), -angle.sin()
    poses[:, 2, 3] = 0.2 * torch.arange(frames)
    lens = torch.tensor([width, width, width / 2, height / 2]).expand(frames, -1)
    return torch.cat([poses.flatten(1), lens], dim=1)[None]


def _world_inputs() -> Inputs:
    # The first frame is given, and therefore at time 0.
    timestep = torch.full((2, 1, 3), 300.0)
    timestep[:, :, 0] = 0
    return {
        "hidden_states": draw(1, 2, 4, 3, 3, 5),
        "encoder_hidden_states": draw(2, 2, 1, 13, 20),
        "mask": key_mask((13, 5), 13).long(),
        "timestep": timestep,
        "camera_conditions": _cameras(3, 3, 5).repeat(2, 1, 1),
        "chunk_plucker": draw(3, 2, 6, 3, 3, 5),
        "data_info": {"img_hw": torch.tensor([[96.0, 160.0]])},
    }


def _build_refiner() -> Any:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    return SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=12,
        cross_attention_dim=36,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=3,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=18,
        num_layers=2,
        caption_channels=20,
    )


def _rotary(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as the model's own helper gives them: (batch, tokens, channels), each angle twice."""
    angles = draw(seed, 1, tokens, 18).repeat_interleave(2, dim=-1).expand(2, -1, -1)
    return angles.cos(), angles.sin()


def _refiner_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 45, 4),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": draw(3, 2, 45).abs() * 100,
        "video_rotary_emb": _rotary(4, 45),
        "encoder_attention_mask": key_mask((13, 5), 13).long(),
    }


def _refiner_window_inputs() -> Inputs:
    """Keys of earlier frames lie in a cache: 15 of the first frame, 30 of the last ones."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    cache = SanaWMRefinerKVCache(2)
    for layer in range(2):
        cache.get(layer).store_sink(draw(10 + layer, 2, 15, 36), draw(20 + layer, 2, 15, 36))
        cache.get(layer).store_history(draw(30 + layer, 2, 30, 36), draw(40 + layer, 2, 30, 36))
    cache.sink_pe = _rotary(5, 15)
    return _refiner_inputs() | {"kv_cache": cache, "kv_cache_mode": "inject_and_capture_post_rope"}


ENTRIES = [
    Entry("SanaVideoTransformer3DModel", _build, _inputs),
    Entry("SanaVideoTransformer3DModel", _build, _picture_inputs, variant="first frame given"),
    Entry("SanaWMTransformer3DModel", _build_world, _world_inputs),
    Entry(
        "SanaWMTransformer3DModel", _build_world_softmax, _world_inputs, variant="softmax in some blocks", error=2e-3
    ),
    Entry("SanaWMLTX2RefinerTransformer3DModel", _build_refiner, _refiner_inputs),
    Entry("SanaWMLTX2RefinerTransformer3DModel", _build_refiner, _refiner_window_inputs, variant="window"),
]
