"""Nucleus: experts that choose their tokens among all of a picture."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build(**more: Any) -> Any:
    from diffusers import NucleusMoEImageTransformer2DModel

    return NucleusMoEImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 12,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "joint_attention_dim": 20,
            "axes_dims_rope": (4, 4, 4),
            "mlp_ratio": 6.0,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 20,
            "capacity_factors": 2.0,
            **more,
        }
    )


def _dense() -> Any:
    return _build(moe_enabled=False, num_layers=2)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 35, 16),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "encoder_hidden_states_mask": key_mask((13, 5), 13).long(),
        "img_shapes": [(1, 5, 7)] * 2,
    }


ENTRIES = [
    Entry("NucleusMoEImageTransformer2DModel", _build, _inputs),
    Entry("NucleusMoEImageTransformer2DModel", _dense, _inputs, variant="no experts"),
]
