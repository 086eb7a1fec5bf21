"""Cosmos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def build_cosmos(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import CosmosTransformer3DModel

        config: dict[str, Any] = {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 24,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 20,
            "adaln_lora_dim": 12,
            "max_size": (8, 16, 16),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,
        }
        return CosmosTransformer3DModel(**{**config, **changes})

    return build


def _inputs() -> Inputs:
    """From text to video: sigmas from 0 to 1 as timesteps. The padding mask would need torchvision; it is no token."""
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "timestep": torch.tensor([0.6, 0.25]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "fps": 30,
        "return_dict": False,
    }


def _masked() -> Inputs:
    return {**_inputs(), "attention_mask": key_mask((13, 5), 13)}


def _from_frames() -> Inputs:
    """The first frame is given: it has a condition mask and a timestep of its own."""
    mask = torch.zeros(2, 1, 3, 6, 10)
    mask[:, :, 0] = 1
    timestep = torch.tensor([[0.01, 0.6, 0.6], [0.01, 0.25, 0.25]])
    return {**_inputs(), "condition_mask": mask, "timestep": timestep.reshape(2, 1, 3, 1, 1)}


def _transfer() -> Inputs:
    """Text (projected), an image, and residuals of a control network for every second block."""
    return {
        **_from_frames(),
        "fps": None,
        "encoder_hidden_states": (draw(2, 2, 13, 28), draw(3, 2, 7, 12)),
        "block_controlnet_hidden_states": [draw(4, 2, 45, 72), draw(5, 2, 45, 72)],
    }


ENTRIES = [
    Entry("CosmosTransformer3DModel", build_cosmos(), _inputs),
    Entry("CosmosTransformer3DModel", build_cosmos(), _masked, "text mask"),
    Entry("CosmosTransformer3DModel", build_cosmos(in_channels=5), _from_frames, "timestep per frame"),
    Entry(
        "CosmosTransformer3DModel",
        build_cosmos(
            in_channels=5,
            num_layers=3,
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=28,
            encoder_hidden_states_channels=20,
            img_context_dim_in=12,
            img_context_dim_out=72,
            controlnet_block_every_n=2,
        ),
        _transfer,
        "image context and control",
    ),
]
