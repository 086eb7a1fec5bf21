"""Qwen-Image with pictures to begin from: edited ones, whose tokens stand behind the new one's, and repainted ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import clear_qwen_vae, pil_picture, transformer
from tests.sharding.zoo.entry import draw, key_mask


class _Squares(torch.nn.Module):
    """In place of the VAE, which would take seconds: these pipelines make a million pixels of every picture.

    Each square of 32 x 32 pixels becomes one place of the latent, by itself.
    """

    temperal_downsample = (False,) * 5

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(z_dim=4, latents_mean=[0.1] * 4, latents_std=[0.5] * 4)
        self.encoder = torch.nn.Conv2d(3 * 32 * 32, 4, 1)
        self.decoder = torch.nn.Conv2d(4, 3 * 32 * 32, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    def encode(self, pictures: torch.Tensor) -> SimpleNamespace:
        squares = torch.nn.functional.pixel_unshuffle(pictures[:, :, 0], 32)
        return SimpleNamespace(latents=self.encoder(squares)[:, :, None])

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.nn.functional.pixel_shuffle(self.decoder(latents[:, :, 0]), 32)[:, :, None],)


def _parts(variant: str = "") -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": clear_qwen_vae(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer(f"QwenImageTransformer2DModel{variant}"),
    }


def edit_pipeline() -> Any:
    from diffusers import QwenImageEditPipeline

    return QwenImageEditPipeline(**{**_parts(), "vae": randomise(_Squares())}, processor=None)


def edit_plus_pipeline(variant: str = "") -> Any:
    from diffusers import QwenImageEditPlusPipeline

    return QwenImageEditPlusPipeline(**{**_parts(variant), "vae": randomise(_Squares())}, processor=None)


def image_to_image_pipeline() -> Any:
    from diffusers import QwenImageImg2ImgPipeline

    return QwenImageImg2ImgPipeline(**_parts())


def inpaint_pipeline() -> Any:
    from diffusers import QwenImageInpaintPipeline

    return QwenImageInpaintPipeline(**_parts())


def prompts() -> dict[str, Any]:
    """Two of different length in one batch, and negative ones of other lengths."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_embeds_mask": key_mask((13, 5), 13),
        "negative_prompt_embeds": draw(2, 2, 3, 20),
        "negative_prompt_embeds_mask": key_mask((2, 3), 3),
        "true_cfg_scale": 3.0,
    }


def edit_arguments() -> dict[str, Any]:
    """5 x 8 tokens, and 13 x 19 of the picture to edit."""
    return {**prompts(), "image": pil_picture(3, 76, 52), "height": 320, "width": 512}


def edit_plus_arguments() -> dict[str, Any]:
    """5 x 9 tokens, and 13 x 19 and 17 x 15 of two pictures; this pipeline takes one prompt, here a padded one."""
    return {
        "prompt_embeds": draw(1, 1, 13, 20),
        "prompt_embeds_mask": key_mask((9,), 13),
        "negative_prompt_embeds": draw(2, 1, 5, 20),
        "negative_prompt_embeds_mask": key_mask((5,), 5),
        "true_cfg_scale": 3.0,
        "image": [pil_picture(3, 76, 52), pil_picture(4, 60, 68)],
        "height": 320,
        "width": 576,
    }


def image_to_image_arguments() -> dict[str, Any]:
    """Three of four steps, for two pictures of each prompt."""
    return {
        **prompts(),
        "image": pil_picture(3, 70, 50),
        "strength": 0.75,
        "num_inference_steps": 4,
        "num_images_per_prompt": 2,
        "height": 80,
        "width": 112,
    }


def inpaint_arguments() -> dict[str, Any]:
    return {
        **prompts(),
        "image": pil_picture(3, 70, 50),
        "mask_image": pil_picture(4, 70, 50),
        "strength": 0.75,
        "num_inference_steps": 4,
        "height": 80,
        "width": 112,
    }


ENTRIES = [
    PipelineEntry("QwenImageEditPipeline", edit_pipeline, edit_arguments),
    PipelineEntry("QwenImageEditPlusPipeline", edit_plus_pipeline, edit_plus_arguments),
    PipelineEntry(
        "QwenImageEditPlusPipeline",
        lambda: edit_plus_pipeline(", edited picture at time 0"),
        edit_plus_arguments,
        "edited pictures at time 0",
    ),
    PipelineEntry("QwenImageImg2ImgPipeline", image_to_image_pipeline, image_to_image_arguments),
    PipelineEntry("QwenImageInpaintPipeline", inpaint_pipeline, inpaint_arguments),
]
