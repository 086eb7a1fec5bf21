"""LTX-2: video and audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def build_ltx2(**changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import LTX2VideoTransformer3DModel

        config: dict[str, Any] = {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "cross_attention_dim": 48,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 3,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": 20,
        }
        return LTX2VideoTransformer3DModel(**{**config, **changes})

    return build


def _inputs(text: tuple[int, int] = (20, 20)) -> Inputs:
    """45 tokens of video, 17 of audio; the mask as the pipeline gives it."""
    mask = key_mask((13, 5), 13)
    return {
        "hidden_states": draw(1, 2, 45, 8),
        "audio_hidden_states": draw(2, 2, 17, 6),
        "encoder_hidden_states": draw(3, 2, 13, text[0]),
        "audio_encoder_hidden_states": draw(4, 2, 13, text[1]),
        "timestep": torch.tensor([600.0, 250.0]),
        "sigma": torch.tensor([600.0, 250.0]),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 3,
        "height": 3,
        "width": 5,
        "fps": 24.0,
        "audio_num_frames": 17,
        "return_dict": False,
    }


def _conditioned() -> Inputs:
    """Given frames have timestep 0, so each token has its own; the audio has one for all."""
    timestep = torch.tensor([[600.0], [250.0]]).repeat(1, 45)
    timestep[:, :15] = 0
    return {**_inputs(), "timestep": timestep, "audio_timestep": torch.tensor([600.0, 250.0])}


def _second() -> Inputs:
    """LTX-2.3: texts are projected elsewhere, timesteps cross over, and some self-attentions are skipped."""
    return {
        **_inputs(text=(48, 24)),
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([1.0, 0.0]),
    }


def _reference() -> Inputs:
    """The last 15 tokens of video are a reference that the others see half, and that sees itself alone."""
    mask = torch.ones(1, 45, 45)
    mask[:, :30, 30:] = 0.5
    mask[:, 30:, :30] = 0
    keyframes = torch.zeros(2, 45, 1)
    keyframes[:, :15] = 1
    return {
        **_inputs(text=(48, 24)),
        "video_self_attention_mask": mask.expand(2, -1, -1),
        "video_keyframes_mask": keyframes,
        "isolate_modalities": True,
    }


SECOND: dict[str, Any] = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
    "rope_type": "split",
}

ENTRIES = [
    Entry("LTX2VideoTransformer3DModel", build_ltx2(), _inputs),
    Entry("LTX2VideoTransformer3DModel", build_ltx2(), _conditioned, "timestep per token"),
    Entry("LTX2VideoTransformer3DModel", build_ltx2(**SECOND), _second, "2.3"),
    Entry(
        "LTX2VideoTransformer3DModel",
        build_ltx2(
            **SECOND,
            ff_bias=False,
            use_prompt_adaln_single=False,
            use_keyframes_abs_pos_embedding=True,
        ),
        _reference,
        "2.5 with reference",
        since="0.41",
    ),
]
