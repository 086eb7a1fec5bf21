"""MiniMax-H3: text, a key frame, sound and video as one packed sequence."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw

_TEXT, _FRAME, _FRAMES, _SOUND = 13, 15, 3, 10


def _build() -> Any:
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=40,
        in_channels=4,
        audio_in_channels=6,
        patch_size=(1, 2, 2),
        text_dim=20,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=20,
        rope_freq_dim=2,
    )


def _inputs() -> Inputs:
    """Rows in the pipeline's order: text, key frame, two channels of sound, 3 frames of 3 x 5."""
    lengths = torch.tensor([_TEXT, _FRAME, _SOUND, _FRAMES * _FRAME])
    kinds = torch.arange(4).repeat_interleave(lengths)
    positions = torch.zeros(len(kinds), 3, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij"), dim=-1).reshape(-1, 2)
    positions[kinds == 0, 0] = torch.arange(_TEXT, dtype=torch.float64)
    positions[kinds == 1, 0] = float(_TEXT)
    positions[kinds == 1, 1:] = grid.double()
    positions[kinds == 2, 0] = _TEXT + torch.arange(_SOUND // 2, dtype=torch.float64).repeat(2)
    positions[kinds == 2, 2] = torch.tensor([0.0, 4.0], dtype=torch.float64).repeat_interleave(_SOUND // 2)
    positions[kinds == 3, 0] = _TEXT + torch.arange(_FRAMES, dtype=torch.float64).repeat_interleave(_FRAME) * 5 / 3
    positions[kinds == 3, 1:] = grid.double().repeat(_FRAMES, 1)
    rows = torch.arange(len(kinds))
    return {
        "hidden_states": draw(1, 2, _FRAME + _FRAMES * _FRAME, 16),
        "audio_hidden_states": draw(2, 2, _SOUND, 6),
        "encoder_hidden_states": draw(3, 2, _TEXT, 20),
        "timestep": torch.tensor([0.0, 0.4, 0.7]),
        "timestep_indices": torch.tensor([0, 0, 1, 2])[kinds],
        "token_tags": torch.tensor([1, 0, 2, 0])[kinds],
        "position_ids": positions,
        "video_indices": rows[(kinds == 1) | (kinds == 3)],
        "audio_indices": rows[kinds == 2],
        "text_indices": rows[kinds == 0],
        "return_dict": False,
    }


ENTRIES = [Entry("MiniMaxH3Transformer3DModel", _build, _inputs)]
