"""Ideogram 4: text and picture in one packed sequence."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw

HEIGHT, WIDTH, TEXT = 5, 7, 13
TOKENS = HEIGHT * WIDTH


def _build() -> Any:
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        intermediate_size=40,
        adaln_dim=20,
        llm_features_dim=28,
        mrope_section=(4, 2, 2),
    )


def _packed(*lengths: int) -> Inputs:
    """Texts stand right before the picture; what is left of them belongs to no sample."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
        SEQUENCE_PADDING_INDICATOR,
    )

    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3) + IMAGE_POSITION_OFFSET
    total, batch = TEXT + TOKENS, len(lengths)
    position_ids = torch.zeros(batch, total, 3, dtype=torch.long)
    segment_ids = torch.full((batch, total), SEQUENCE_PADDING_INDICATOR, dtype=torch.long)
    indicator = torch.zeros(batch, total, dtype=torch.long)
    for sample, length in enumerate(lengths):
        first = TEXT - length
        position_ids[sample, first:TEXT] = torch.arange(length)[:, None]
        position_ids[sample, TEXT:] = positions
        indicator[sample, first:TEXT] = LLM_TOKEN_INDICATOR
        indicator[sample, TEXT:] = OUTPUT_IMAGE_INDICATOR
        segment_ids[sample, first:] = 1
    latents = torch.cat([torch.zeros(batch, TEXT, 16), draw(1, batch, TOKENS, 16)], dim=1)
    return {
        "hidden_states": latents,
        "timestep": torch.full((batch,), 0.4),
        "encoder_hidden_states": draw(2, batch, total, 28),
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "indicator": indicator,
    }


def _picture_alone() -> Inputs:
    """The pass without text."""
    inputs = _packed(TEXT, 5)
    for name in ("hidden_states", "encoder_hidden_states", "position_ids", "segment_ids", "indicator"):
        inputs[name] = inputs[name][:, TEXT:]
    return {**inputs, "encoder_hidden_states": torch.zeros(2, TOKENS, 28)}


def _time_per_token() -> Inputs:
    inputs = _packed(TEXT, 5)
    return {**inputs, "timestep": draw(3, 2, TEXT + TOKENS).sigmoid()}


ENTRIES = [
    Entry("Ideogram4Transformer2DModel", _build, lambda: _packed(TEXT, 5)),
    Entry("Ideogram4Transformer2DModel", _build, lambda: _packed(TEXT, TEXT), "nothing left out"),
    Entry("Ideogram4Transformer2DModel", _build, _picture_alone, "picture alone"),
    Entry("Ideogram4Transformer2DModel", _build, _time_per_token, "timestep per token"),
]
