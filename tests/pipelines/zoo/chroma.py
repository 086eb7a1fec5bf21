"""Chroma: the prompt's and the negative prompt's texts in forwards of their own, both padded."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import image_vae
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import transformer
from tests.sharding.zoo.entry import draw, key_mask

_MODEL = "ChromaTransformer2DModel"


def _components(model: str) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": image_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer(model),
    }


def _build(model: str = _MODEL) -> Any:
    from diffusers import ChromaPipeline

    return ChromaPipeline(**_components(model))


def _build_img2img() -> Any:
    from diffusers import ChromaImg2ImgPipeline

    return ChromaImg2ImgPipeline(**_components(_MODEL))


def _arguments() -> dict[str, Any]:
    """Two prompts of different length in one batch; the masks are numbers, as the pipeline's own text encoding has."""
    return {
        "prompt_embeds": draw(1, 2, 13, 24),
        "prompt_attention_mask": key_mask((13, 5), 13).float(),
        "negative_prompt_embeds": draw(2, 2, 7, 24),
        "negative_prompt_attention_mask": key_mask((2, 7), 7).float(),
        "guidance_scale": 3.0,
        "height": 20,
        "width": 28,
    }


def _ip_arguments() -> dict[str, Any]:
    embeds = {"ip_adapter_image_embeds": [draw(3, 2, 1, 28)], "negative_ip_adapter_image_embeds": [draw(4, 2, 1, 28)]}
    return {**_arguments(), **embeds}


def _img2img_arguments() -> dict[str, Any]:
    return {**_arguments(), "image": torch.sigmoid(draw(5, 2, 3, 20, 28)), "strength": 0.9}


ENTRIES = [
    PipelineEntry("ChromaPipeline", _build, _arguments),
    PipelineEntry("ChromaPipeline", lambda: _build(f"{_MODEL}, IP adapter"), _ip_arguments, "IP adapter"),
    PipelineEntry("ChromaImg2ImgPipeline", _build_img2img, _img2img_arguments),
]
