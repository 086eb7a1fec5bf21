"""Qwen-Image: two streams with one attention; edited pictures, layers, and the single stream of 2.1."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build() -> Any:
    return transformer("QwenImageTransformer2DModel")


def _edit_plus() -> Any:
    return transformer("QwenImageTransformer2DModel", zero_cond_t=True)


def _layered() -> Any:
    return transformer("QwenImageTransformer2DModel", use_layer3d_rope=True, use_additional_t_cond=True)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 35, 16),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_hidden_states_mask": key_mask((13, 5), 13).long(),
        "img_shapes": [[(1, 5, 7)]] * 2,
    }


def _control_inputs() -> Inputs:
    return _inputs() | {"controlnet_block_samples": [draw(4, 2, 35, 36)]}


def _edit_inputs() -> Inputs:
    return _inputs() | {"hidden_states": draw(1, 2, 35 + 9, 16), "img_shapes": [[(1, 5, 7), (1, 3, 3)]] * 2}


def _layered_inputs() -> Inputs:
    return _inputs() | {
        "hidden_states": draw(1, 2, 45, 16),
        "img_shapes": [[(1, 3, 5)] * 3] * 2,
        "additional_t_cond": torch.tensor([0, 0]),
    }


def _build_21(**more: Any) -> Any:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        context_in_dim=20,
        axes_dims_rope=(4, 4, 4),
        **more,
    )


def _noisy_text_21() -> Any:
    return _build_21(causal_condition=False)


def _inputs_21() -> Inputs:
    # The picture's 6 x 10 tokens stand for 15 slots behind the text.
    return {
        "hidden_states": draw(1, 2, 60, 16),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_hidden_states_mask": key_mask((13, 5), 13),
        "img_shapes": [[(1, 6, 10)]] * 2,
        "img_mask": torch.arange(28).ge(13).repeat(2, 1),
    }


def _edit_inputs_21() -> Inputs:
    # A picture to be edited fills the slots 3 to 6 of the text.
    slots = torch.arange(28).ge(13) | ((torch.arange(28) >= 3) & (torch.arange(28) < 6))
    return _inputs_21() | {
        "hidden_states": draw(1, 2, 12 + 60, 16),
        "encoder_hidden_states_mask": key_mask((13, 9), 13),
        "img_shapes": [[(1, 2, 6), (1, 6, 10)]] * 2,
        "img_mask": slots.repeat(2, 1),
    }


ENTRIES = [
    Entry("QwenImageTransformer2DModel", _build, _inputs),
    Entry("QwenImageTransformer2DModel", _build, _control_inputs, variant="controlnet"),
    Entry("QwenImageTransformer2DModel", _edit_plus, _edit_inputs, variant="edited picture at time 0"),
    Entry("QwenImageTransformer2DModel", _layered, _layered_inputs, variant="layers"),
    Entry("QwenImage21Transformer2DModel", _build_21, _inputs_21),
    Entry("QwenImage21Transformer2DModel", _build_21, _edit_inputs_21, variant="edited picture"),
    Entry("QwenImage21Transformer2DModel", _noisy_text_21, _inputs_21, variant="no causal condition"),
]
