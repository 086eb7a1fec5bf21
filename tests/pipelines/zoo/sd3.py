"""Stable Diffusion 3: guidance that batches the negative and the positive prompts, and skips layers."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import image_vae
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import clip_with_projection, letter_tokenizer, transformer
from tests.sharding.zoo.entry import draw


def _components(**encoders: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_vae(),
        "transformer": transformer("SD3Transformer2DModel"),
        **dict.fromkeys(names),
        **encoders,
    }


def _build() -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(**_components())


def _build_with_words() -> Any:
    """Both CLIPs; T5 is left out, as diffusers allows: zeros stand in for its tokens."""
    from diffusers import StableDiffusion3Pipeline

    encoders = {
        "text_encoder": clip_with_projection(8, 5),
        "tokenizer": letter_tokenizer(13),
        "text_encoder_2": clip_with_projection(12, 7, seed=1),
        "tokenizer_2": letter_tokenizer(13),
    }
    return StableDiffusion3Pipeline(**_components(**encoders))


def _build_img2img() -> Any:
    from diffusers import StableDiffusion3Img2ImgPipeline

    return StableDiffusion3Img2ImgPipeline(**_components())


def _build_perturbed() -> Any:
    """Guidance away from what the model draws where pictures attend to themselves alone in one layer."""
    from diffusers import StableDiffusion3PAGPipeline

    return StableDiffusion3PAGPipeline(**_components(), pag_applied_layers="blocks.1")


def _arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "pooled_prompt_embeds": draw(2, 2, 12),
        "negative_prompt_embeds": draw(3, 2, 13, 20),
        "negative_pooled_prompt_embeds": draw(4, 2, 12),
        "guidance_scale": 3.0,
        "height": 20,
        "width": 28,
    }


def _word_arguments() -> dict[str, Any]:
    """Embeddings given as arguments are not repeated for several pictures, words are."""
    return {
        "prompt": ["a red fox", "snow"],
        "negative_prompt": ["blurred", "dark, wet"],
        "num_images_per_prompt": 2,
        "max_sequence_length": 6,
        "guidance_scale": 3.0,
        "height": 20,
        "width": 28,
    }


def _skipping(*layers: int) -> dict[str, Any]:
    """Every step but the first runs the transformer again without these layers."""
    return {**_arguments(), "skip_guidance_layers": list(layers), "skip_layer_guidance_stop": 1.0}


def _img2img_arguments() -> dict[str, Any]:
    return {**_arguments(), "image": draw(6, 2, 3, 20, 28).sigmoid(), "strength": 0.8}


ENTRIES = [
    PipelineEntry("StableDiffusion3Pipeline", _build, _arguments),
    PipelineEntry("StableDiffusion3Pipeline", _build_with_words, _word_arguments, "words, two pictures each"),
    PipelineEntry("StableDiffusion3Pipeline", _build, lambda: _skipping(1), "skip layer guidance"),
    # The tokens are cut at the first block: this one must do without.
    PipelineEntry("StableDiffusion3Pipeline", _build, lambda: _skipping(0), "skip layer guidance of the first layer"),
    PipelineEntry("StableDiffusion3Img2ImgPipeline", _build_img2img, _img2img_arguments),
    PipelineEntry("StableDiffusion3PAGPipeline", _build_perturbed, lambda: {**_arguments(), "pag_scale": 2.0}),
]
