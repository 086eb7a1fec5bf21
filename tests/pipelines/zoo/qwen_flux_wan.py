"""Pipelines of three families that other tests build upon too: Qwen-Image, FLUX.1, Wan."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import image_vae, qwen_image_vae, transformer, wan_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.sharding.models import qwen_image, wan
from tests.sharding.zoo.entry import draw, key_mask


def qwen_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_image_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(qwen_image()),
    )


def qwen_arguments() -> dict[str, Any]:
    """Two prompts of different length in one batch, true CFG with a shorter negative prompt, odd tokens."""
    return {
        "prompt_embeds": draw(1, 2, 13, 24),
        "prompt_embeds_mask": key_mask((13, 3), 13),
        "negative_prompt_embeds": draw(2, 2, 3, 24),
        "negative_prompt_embeds_mask": key_mask((2, 3), 3),
        "true_cfg_scale": 3.0,
        "height": 80,
        "width": 112,
    }


def flux_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=randomise(transformer("FluxTransformer2DModel")),
    )


def flux_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 1, 13, 24),
        "pooled_prompt_embeds": draw(2, 1, 20),
        "height": 20,
        "width": 28,
        "guidance_scale": 3.5,
    }


def wan_pipeline() -> Any:
    """Two transformers, one for the noisy and one for the late steps, as in Wan 2.2."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=randomise(wan(), seed=1),
        transformer_2=randomise(wan(), seed=2),
        boundary_ratio=0.7,
    )


def wan_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 1, 13, 20),
        "negative_prompt_embeds": draw(2, 1, 7, 20),
        "height": 48,
        "width": 80,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }


ENTRIES = [
    PipelineEntry("QwenImagePipeline", qwen_pipeline, qwen_arguments),
    PipelineEntry("FluxPipeline", flux_pipeline, flux_arguments),
    PipelineEntry("WanPipeline", wan_pipeline, wan_arguments),
]
