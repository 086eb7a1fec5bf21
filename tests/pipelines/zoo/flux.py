"""Flux.1 with pictures to begin from, with several pictures of each prompt, and with a picture as a further prompt."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import clip_text_encoder, image_vae, t5_text_encoder
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import (
    letter_tokenizer,
    pil_picture,
    resized,
    transformer,
)
from tests.sharding.zoo.entry import draw


def flux_parts(**config: Any) -> dict[str, Any]:
    """Components of a pipeline to which the text comes as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": image_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": resized(transformer("FluxTransformer2DModel"), **config),
    }


def flux_prompts() -> dict[str, Any]:
    """Two in one batch, with negative ones; Flux has no mask for its text, whose length is the same for all."""
    return {
        "prompt_embeds": draw(1, 2, 13, 24),
        "pooled_prompt_embeds": draw(2, 2, 20),
        "negative_prompt_embeds": draw(3, 2, 13, 24),
        "negative_pooled_prompt_embeds": draw(4, 2, 20),
        "true_cfg_scale": 2.0,
        "guidance_scale": 3.5,
    }


def encoded_pipeline() -> Any:
    from diffusers import FluxPipeline

    encoders = {
        "text_encoder": clip_text_encoder(letter_tokenizer(32), 20),
        "tokenizer": letter_tokenizer(13),
        "text_encoder_2": t5_text_encoder(letter_tokenizer(13), 24),
        "tokenizer_2": letter_tokenizer(13),
    }
    return FluxPipeline(**{**flux_parts(), **encoders})


def encoded_arguments() -> dict[str, Any]:
    """Two pictures of each of two prompts; for embeddings the pipeline would not multiply the text."""
    return {
        "prompt": ["a red fox", "snow"],
        "negative_prompt": ["blurred", "dark, wet"],
        "num_images_per_prompt": 2,
        "max_sequence_length": 13,
        "true_cfg_scale": 2.0,
        "guidance_scale": 3.5,
        "height": 20,
        "width": 28,
    }


def ip_adapter_pipeline() -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline(**{**flux_parts(), "transformer": transformer("FluxTransformer2DModel, IP adapter")})


def ip_adapter_arguments() -> dict[str, Any]:
    return {
        **flux_prompts(),
        "ip_adapter_image_embeds": [draw(5, 1, 1, 28)],
        "negative_ip_adapter_image_embeds": [draw(6, 1, 1, 28)],
        "height": 20,
        "width": 28,
    }


def kontext_pipeline() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux_parts())


def kontext_arguments() -> dict[str, Any]:
    """5 x 7 tokens, and 3 x 4 of the picture to edit; otherwise the pipeline brings both to a million pixels."""
    return {
        **flux_prompts(),
        "image": pil_picture(5, 13, 18),
        "_auto_resize": False,
        "max_area": 20 * 28,
        "height": 20,
        "width": 28,
    }


def fill_pipeline() -> Any:
    from diffusers import FluxFillPipeline

    # The noise, the picture to fill and the mask, each of 16 channels, lie in one row.
    return FluxFillPipeline(**flux_parts(in_channels=48, out_channels=16))


def fill_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 2, 13, 24),
        "pooled_prompt_embeds": draw(2, 2, 20),
        "guidance_scale": 30.0,
        "image": pil_picture(5, 20, 30),
        "mask_image": pil_picture(6, 20, 30),
        "height": 20,
        "width": 28,
    }


def image_to_image_pipeline() -> Any:
    from diffusers import FluxImg2ImgPipeline

    return FluxImg2ImgPipeline(**flux_parts())


def image_to_image_arguments() -> dict[str, Any]:
    """Three of four steps."""
    return {
        **flux_prompts(),
        "image": pil_picture(5, 20, 30),
        "strength": 0.75,
        "num_inference_steps": 4,
        "height": 20,
        "width": 28,
    }


ENTRIES = [
    PipelineEntry("FluxPipeline", encoded_pipeline, encoded_arguments, "two pictures of each of two prompts"),
    PipelineEntry("FluxPipeline", ip_adapter_pipeline, ip_adapter_arguments, "IP adapter"),
    PipelineEntry("FluxKontextPipeline", kontext_pipeline, kontext_arguments),
    PipelineEntry("FluxFillPipeline", fill_pipeline, fill_arguments),
    PipelineEntry("FluxImg2ImgPipeline", image_to_image_pipeline, image_to_image_arguments),
]
