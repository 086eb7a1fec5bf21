"""Cosmos 3: one packed sequence of text, video, sound and actions, without a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import Cosmos3OmniTransformer

        config: dict[str, Any] = {
            "head_dim": 16,
            "hidden_size": 48,
            "intermediate_size": 40,
            "latent_channel": 4,
            "latent_patch_size": 2,
            "num_attention_heads": 6,
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "patch_latent_dim": 16,
            "vocab_size": 32,
            "rope_axes_dim": (4, 2, 2),
        }
        return Cosmos3OmniTransformer(**{**config, **changes})

    return build


def _positions(others: int = 0) -> torch.Tensor:
    """(3, tokens) time, height and width: the same for text and sound, a grid for the video."""
    text = torch.arange(13.0).expand(3, -1)
    grid = torch.stack(torch.meshgrid(torch.arange(3.0) + 100, torch.arange(3.0), torch.arange(5.0), indexing="ij"))
    more = (torch.arange(float(others)) / 2 + 100).expand(3, -1)
    return torch.cat([text, grid.flatten(1), more], dim=1)


def _inputs() -> Inputs:
    """13 tokens of text, 45 of video, whose first frame is given."""
    return {
        "input_ids": torch.arange(13) * 7 % 32,
        "text_indexes": torch.arange(13),
        "position_ids": _positions(),
        "und_len": 13,
        "sequence_length": 58,
        "vision_tokens": [draw(1, 1, 4, 3, 5, 10)],
        "vision_token_shapes": [(3, 3, 5)],
        "vision_sequence_indexes": torch.arange(13, 58),
        "vision_mse_loss_indexes": torch.arange(28, 58),
        "vision_timesteps": torch.full((30,), 600.0),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
        "return_dict": False,
    }


def _omni() -> Inputs:
    """7 tokens of sound and 4 actions besides."""
    return {
        **_inputs(),
        "position_ids": _positions(11),
        "sequence_length": 69,
        "sound_tokens": [draw(2, 6, 7)],
        "sound_token_shapes": [(7, 1, 1)],
        "sound_sequence_indexes": torch.arange(58, 65),
        "sound_mse_loss_indexes": torch.arange(58, 65),
        "sound_timesteps": torch.full((7,), 600.0),
        "sound_noisy_frame_indexes": [torch.arange(7)],
        "action_tokens": [draw(3, 4, 5)],
        "action_token_shapes": [(4, 1, 1)],
        "action_sequence_indexes": torch.arange(65, 69),
        "action_mse_loss_indexes": torch.arange(66, 69),
        "action_timesteps": torch.full((3,), 600.0),
        "action_noisy_frame_indexes": [torch.arange(1, 4)],
        "action_domain_ids": [torch.tensor(2)],
    }


ENTRIES = [
    Entry("Cosmos3OmniTransformer", _build(), _inputs),
    Entry(
        "Cosmos3OmniTransformer",
        _build(
            action_gen=True,
            action_dim=5,
            num_embodiment_domains=4,
            sound_gen=True,
            sound_dim=6,
            hidden_act="relu2",
            qk_norm_for_text=False,
            use_und_k_norm_for_gen=True,
        ),
        _omni,
        "sound and actions",
    ),
]
