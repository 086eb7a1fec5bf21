"""Z-Image: lists of texts, each padded to a multiple of 32 tokens; the negative ones are in the same batch."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import image_vae
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import pil_picture, transformer
from tests.sharding.zoo.entry import draw


def z_image_parts() -> dict[str, Any]:
    """Components of a pipeline to which the text comes as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer("ZImageTransformer2DModel"),
    }


def z_image_pipeline() -> Any:
    from diffusers import ZImagePipeline

    return ZImagePipeline(**z_image_parts())


def image_to_image_pipeline() -> Any:
    from diffusers import ZImageImg2ImgPipeline

    return ZImageImg2ImgPipeline(**z_image_parts())


def z_image_arguments() -> dict[str, Any]:
    """5 x 7 tokens, padded to 64; texts that are padded to 32 and 64 tokens."""
    return {
        "prompt_embeds": [draw(1, 13, 20), draw(2, 37, 20)],
        "negative_prompt_embeds": [draw(3, 5, 20), draw(4, 3, 20)],
        "guidance_scale": 3.0,
        "height": 20,
        "width": 28,
    }


def changing_arguments() -> dict[str, Any]:
    """Guidance ends before the last step, which has half the batch; two pictures of each prompt."""
    return {**z_image_arguments(), "num_images_per_prompt": 2, "cfg_truncation": 0.3, "cfg_normalization": True}


def image_to_image_arguments() -> dict[str, Any]:
    """Three of four steps."""
    return {**z_image_arguments(), "image": pil_picture(5, 20, 30), "strength": 0.75, "num_inference_steps": 4}


ENTRIES = [
    PipelineEntry("ZImagePipeline", z_image_pipeline, z_image_arguments),
    PipelineEntry("ZImagePipeline", z_image_pipeline, changing_arguments, "guidance that ends early"),
    PipelineEntry("ZImageImg2ImgPipeline", image_to_image_pipeline, image_to_image_arguments),
]
