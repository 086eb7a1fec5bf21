"""Mochi."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.sharding.zoo.entry import draw, key_mask
from tests.sharding.zoo.mochi import build_mochi


def _pipeline() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

    # Its norms have 32 groups, always.
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, invert_sigmas=True),
        vae=randomise(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_mochi(in_channels=12)),
    )


def _arguments() -> dict[str, Any]:
    """25 tokens of video, 5 frames of 5; prompts of different length, with and without guidance in one batch."""
    return {
        "prompt_embeds": draw(1, 2, 13, 16),
        "prompt_attention_mask": key_mask((13, 5), 13),
        "negative_prompt_embeds": draw(2, 2, 13, 16),
        "negative_prompt_attention_mask": key_mask((4, 7), 13),
        "guidance_scale": 4.5,
        "height": 16,
        "width": 80,
        "num_frames": 25,
    }


ENTRIES = [PipelineEntry("MochiPipeline", _pipeline, _arguments)]
