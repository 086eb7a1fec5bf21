"""Flux.2 with pictures to edit, whose tokens stand beside the new one's in every step or only in the first."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import pil_picture, resized, transformer
from tests.sharding.zoo.entry import draw


def _vae() -> Any:
    """Shrinks a side to an eighth: a picture to edit must have 64 pixels a side, which are 16 tokens at a half."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    # Statistics of the latent, no parameters.
    vae.bn.running_mean.copy_(0.1 * draw(1, 16))
    vae.bn.running_var.copy_(1.0 + 0.3 * torch.tanh(draw(2, 16)))
    return randomise(vae)


def _parts(**config: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": resized(transformer("Flux2Transformer2DModel"), **config),
    }


def flux2_pipeline() -> Any:
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(**_parts())


def klein_pipeline() -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(**_parts(guidance_embeds=False))


def klein_kv_pipeline() -> Any:
    from diffusers import Flux2KleinKVPipeline

    return Flux2KleinKVPipeline(**_parts(guidance_embeds=False))


def flux2_arguments() -> dict[str, Any]:
    """5 x 7 tokens and 4 x 9 of the picture to edit, for two prompts."""
    return {
        "prompt_embeds": draw(3, 2, 13, 24),
        "image": pil_picture(4, 70, 150),
        "guidance_scale": 4.0,
        "height": 80,
        "width": 112,
    }


def klein_arguments() -> dict[str, Any]:
    """5 x 7 tokens, 4 x 9 and 4 x 5 of two pictures to edit, and a shorter negative prompt."""
    return {
        **flux2_arguments(),
        "image": [pil_picture(4, 70, 150), pil_picture(5, 66, 81)],
        "negative_prompt_embeds": draw(6, 2, 5, 24),
    }


def klein_kv_arguments() -> dict[str, Any]:
    """The first step keeps the keys of the picture's 4 x 9 tokens for the others."""
    return {"prompt_embeds": draw(3, 2, 13, 24), "image": pil_picture(4, 70, 150), "height": 80, "width": 112}


ENTRIES = [
    PipelineEntry("Flux2Pipeline", flux2_pipeline, flux2_arguments),
    PipelineEntry("Flux2KleinPipeline", klein_pipeline, klein_arguments),
    PipelineEntry("Flux2KleinKVPipeline", klein_kv_pipeline, klein_kv_arguments),
]
