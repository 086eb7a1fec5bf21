"""The transformer within DreamLite's UNet."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build(**changes: Any) -> Any:
    """With the attention processor that the UNet sets."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    config: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 24,
        "num_layers": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 20,
        "qk_norm": "rms_norm",
        "num_kv_heads": 1,
        "ff_mult": 3,
    }
    model = DreamLiteTransformer2DModel(**{**config, **changes})
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())
    return model


def _inputs() -> Inputs:
    """The UNet makes a bias of the text's mask."""
    return {
        "hidden_states": draw(1, 2, 24, 5, 7),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": (1 - key_mask((13, 5), 13).float())[:, None] * -10000.0,
        "return_dict": False,
    }


ENTRIES = [
    Entry("DreamLiteTransformer2DModel", lambda: _build(use_linear_projection=True), _inputs),
    Entry(
        "DreamLiteTransformer2DModel",
        lambda: _build(use_self_attention=False),
        _inputs,
        variant="without self-attention",
    ),
]
