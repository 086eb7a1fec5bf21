"""Kandinsky 5 and 6, and Kandinsky 6's super-resolution."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _five() -> Any:
    return transformer("Kandinsky5Transformer3DModel")


def _five_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 3, 6, 10, 9),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "timestep": torch.full((2,), 501.0),
        "pooled_projections": draw(3, 2, 12),
        "visual_rope_pos": [torch.arange(3), torch.arange(3), torch.arange(5)],
        "text_rope_pos": torch.arange(13),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def _five_nabla() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = _five()
    # Not set_attention_backend(), which chooses for every other model of the process, too.
    for processor in model.attn_processors.values():
        processor._attention_backend = AttentionBackendName.FLEX
    return model


def _five_nabla_inputs() -> Inputs:
    """Attention under a mask of 8 x 8 blocks that the model finds itself."""
    return {
        **_five_inputs(),
        "hidden_states": draw(1, 2, 3, 16, 32, 9),
        "visual_rope_pos": [torch.arange(3), torch.arange(8), torch.arange(16)],
        "sparse_params": {"sta_mask": torch.eye(6, dtype=torch.bool)[None, None], "to_fractal": True, "P": 0.5},
    }


def _six() -> Any:
    from diffusers import Kandinsky6Transformer3DModel

    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=32,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
        in_audio_dim=6,
        out_audio_dim=6,
        model_dim_a=32,
        ff_dim_a=40,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )


def _six_inputs() -> Inputs:
    """A video with its sound; the last frame is a picture that it begins with."""
    return {
        "hidden_states": draw(1, 2, 3, 6, 10, 9),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "pooled_projections": draw(3, 2, 12),
        "timestep": torch.full((2,), 501.0),
        "audio_hidden_states": draw(4, 2, 11, 6),
        "visual_rope_pos": (torch.tensor([0, 1, 0]), torch.arange(3), torch.arange(5)),
        "encoder_attention_mask": key_mask((13, 5), 13),
        "visual_token_type_ids": torch.tensor([[0, 0, 1]] * 2),
    }


def _silent() -> Inputs:
    """A video alone."""
    return {
        name: value
        for name, value in _six_inputs().items()
        if name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    }


def _six_sr() -> Any:
    from diffusers import Kandinsky6SRTransformer3DModel

    return Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=8,
        time_dim=32,
        model_dim=48,
        ff_dim=64,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_window=(1, 1, 1),
    )


def _six_sr_inputs() -> Inputs:
    return {"hidden_states": draw(1, 2, 3, 8, 16, 9), "timestep": torch.full((2,), 501.0)}


ENTRIES = [
    Entry("Kandinsky5Transformer3DModel", _five, _five_inputs, error=2e-3),
    Entry("Kandinsky5Transformer3DModel", _five_nabla, _five_nabla_inputs, variant="nabla", error=2e-3),
    Entry("Kandinsky6Transformer3DModel", _six, _six_inputs),
    Entry("Kandinsky6Transformer3DModel", _six, _silent, variant="without sound"),
    Entry("Kandinsky6SRTransformer3DModel", _six_sr, _six_sr_inputs),
]
