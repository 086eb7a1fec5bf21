"""HiDream: feed-forward layers that are mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build(num_routed_experts: int = 4) -> Any:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        caption_channels=[20, 28],
        text_emb_dim=12,
        num_routed_experts=num_routed_experts,
        num_activated_experts=2,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(12, 14),
        llama_layers=[0, 1, 2, 2],
    )


def _inputs(height: int = 10, width: int = 14) -> Inputs:
    """A picture that is not square is filled up to ``max_resolution``: 5 x 7 tokens to 42."""
    return {
        "hidden_states": draw(1, 2, 4, height, width),
        "timesteps": torch.tensor([600, 600]),
        "encoder_hidden_states_t5": draw(2, 2, 13, 20),
        "encoder_hidden_states_llama3": draw(3, 3, 2, 11, 28),
        "pooled_embeds": draw(4, 2, 12),
    }


def _packed_inputs() -> Inputs:
    """Patches, ids and mask from outside, for pictures of two sizes."""
    tokens, sizes = 42, [(5, 7), (3, 5)]
    mask, ids = torch.zeros(2, tokens), torch.zeros(2, tokens, 3)
    for sample, (height, width) in enumerate(sizes):
        mask[sample, : height * width] = 1
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ids[sample, : height * width, 1:] = torch.stack([rows, columns], dim=-1).reshape(-1, 2).float()
    # The output is joined along the batch, so it is asked for at one size.
    return {
        **_inputs(),
        "hidden_states": draw(1, 2, tokens, 16),
        "hidden_states_masks": mask,
        "img_ids": ids,
        "img_sizes": [(3, 5), (3, 5)],
    }


ENTRIES = [
    Entry("HiDreamImageTransformer2DModel", _build, _inputs),
    Entry("HiDreamImageTransformer2DModel", _build, lambda: _inputs(10, 10), "square"),
    Entry("HiDreamImageTransformer2DModel", _build, _packed_inputs, "patches"),
    Entry("HiDreamImageTransformer2DModel", lambda: _build(num_routed_experts=0), _inputs, "no experts"),
]
