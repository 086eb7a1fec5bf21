"""Whole diffusers pipelines from tiny components with random weights; text comes as embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    WanPipeline,
)

from tests.sharding.models import flux, qwen_image, randomise, wan


def qwen_pipeline() -> Any:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomise(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(qwen_image()),
    )


def qwen_arguments() -> dict[str, Any]:
    """Two prompts of different length in one batch, true CFG with a shorter negative prompt, odd tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(13) < torch.tensor([[13], [3]])
    return {
        "prompt_embeds": torch.randn(2, 13, 24, generator=generator),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": torch.randn(2, 3, 24, generator=generator),
        "negative_prompt_embeds_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "true_cfg_scale": 3.0,
        "height": 80,
        "width": 112,
    }


def flux_pipeline() -> Any:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomise(vae),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=randomise(flux()),
    )


def flux_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(1, 13, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 20, generator=generator),
        "height": 20,
        "width": 28,
        "guidance_scale": 3.5,
    }


def wan_pipeline() -> Any:
    """Two transformers, one for the noisy and one for the late steps, as in Wan 2.2."""
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=randomise(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=randomise(wan(), seed=1),
        transformer_2=randomise(wan(), seed=2),
        boundary_ratio=0.7,
    )


def wan_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "prompt_embeds": torch.randn(1, 13, 20, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 7, 20, generator=generator),
        "height": 48,
        "width": 80,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "qwen": (qwen_pipeline, qwen_arguments),
    "flux": (flux_pipeline, flux_arguments),
    "wan": (wan_pipeline, wan_arguments),
}
