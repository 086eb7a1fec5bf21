"""ACE-Step: music, with every other attention confined to a window."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def build_ace_step(in_channels: int = 20) -> Any:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=in_channels,
        audio_acoustic_hidden_dim=6,
        patch_size=2,
        sliding_window=5,
        encoder_hidden_size=28,
    )


def _inputs() -> Inputs:
    """69 latents make 35 tokens, the last of which is half empty."""
    return {
        "hidden_states": draw(1, 2, 69, 6),
        "timestep": torch.full((2,), 0.6),
        "timestep_r": torch.full((2,), 0.6),
        "encoder_hidden_states": draw(2, 2, 13, 28),
        "context_latents": draw(3, 2, 69, 14),
    }


ENTRIES = [Entry("AceStepTransformer1DModel", build_ace_step, _inputs)]
