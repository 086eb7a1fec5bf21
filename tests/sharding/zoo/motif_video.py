"""Motif-Video: two streams, then one, then a decoder that starts again from the noise."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build(**more: Any) -> Any:
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        **{
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 20,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
            **more,
        }
    )


def _plain() -> Any:
    return _build(num_decoder_layers=0, num_single_layers=2, enable_text_cross_attention_single=False)


def _from_picture() -> Any:
    return _build(image_embed_dim=14)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 9, 3, 6, 10),
        "timestep": draw(2, 2).abs() * 100,
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13),
    }


def _picture_inputs() -> Inputs:
    return _inputs() | {"image_embeds": draw(4, 2, 7, 14)}


ENTRIES = [
    Entry("MotifVideoTransformer3DModel", _build, _inputs),
    Entry("MotifVideoTransformer3DModel", _plain, _inputs, variant="no decoder"),
    Entry("MotifVideoTransformer3DModel", _from_picture, _picture_inputs, variant="first frame given"),
]
