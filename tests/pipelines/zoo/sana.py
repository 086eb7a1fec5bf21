"""Sana: linear attention over pictures and videos, padded texts, a solver of second order."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import transformer
from tests.sharding.zoo.entry import draw, key_mask


def _deep_vae(halvings: int = 5) -> Any:
    """An AutoencoderDC; Sana's sizes are multiples of 32, and so much does its own shrink a side."""
    from diffusers import AutoencoderDC

    blocks = halvings + 1
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        encoder_layers_per_block=(1,) * blocks,
        decoder_layers_per_block=(1,) * blocks,
        encoder_qkv_multiscales=((),) * blocks,
        decoder_qkv_multiscales=((),) * blocks,
        scaling_factor=0.4,
    )
    return randomise(vae)


def _video_vae() -> Any:
    """Wan 2.2's VAE: sides to a sixteenth, so that 96 x 160 pixels are an odd number of tokens."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return randomise(vae)


def _components(vae: Any, model: str) -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "transformer": transformer(model),
        "scheduler": scheduler,
    }


def _build() -> Any:
    from diffusers import SanaPipeline

    return SanaPipeline(**_components(_deep_vae(), "SanaTransformer2DModel"))


def _build_sprint() -> Any:
    from diffusers import SanaSprintPipeline, SCMScheduler

    # Its patches are 2 x 2.
    components = _components(_deep_vae(halvings=4), "SanaTransformer2DModel, guidance embedding")
    return SanaSprintPipeline(**{**components, "scheduler": SCMScheduler()})


def _build_controlled() -> Any:
    from diffusers import SanaControlNetModel, SanaControlNetPipeline

    sizes = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": 20,
        "sample_size": 16,
    }
    controlnet = randomise(SanaControlNetModel(**sizes), seed=1)
    return SanaControlNetPipeline(**_components(_deep_vae(), "SanaTransformer2DModel"), controlnet=controlnet)


def _build_perturbed() -> Any:
    """Guidance away from what the model draws where one layer's tokens attend to themselves alone."""
    from diffusers import SanaPAGPipeline

    components = _components(_deep_vae(), "SanaTransformer2DModel")
    return SanaPAGPipeline(**components, pag_applied_layers="transformer_blocks.1")


def _build_video() -> Any:
    from diffusers import SanaVideoPipeline

    return SanaVideoPipeline(**_components(_video_vae(), "SanaVideoTransformer3DModel"))


def _build_video_of_picture() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaImageToVideoPipeline

    components = _components(_video_vae(), "SanaVideoTransformer3DModel")
    return SanaImageToVideoPipeline(**{**components, "scheduler": FlowMatchEulerDiscreteScheduler()})


def _texts() -> dict[str, Any]:
    """Two prompts of different length in one batch. Binning would look for a size of its own."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_attention_mask": key_mask((13, 5), 13).long(),
        "use_resolution_binning": False,
    }


def _negative_texts() -> dict[str, Any]:
    return {
        "negative_prompt": None,
        "negative_prompt_embeds": draw(2, 2, 13, 20),
        "negative_prompt_attention_mask": key_mask((2, 9), 13).long(),
        "guidance_scale": 3.0,
    }


def _arguments() -> dict[str, Any]:
    return {**_texts(), **_negative_texts(), "height": 160, "width": 224}


def _sprint_arguments() -> dict[str, Any]:
    return {**_texts(), "height": 160, "width": 224, "num_inference_steps": 2}


def _controlled_arguments() -> dict[str, Any]:
    return {**_arguments(), "control_image": torch.sigmoid(draw(3, 2, 3, 160, 224))}


def _video_arguments() -> dict[str, Any]:
    """3 latent frames of 3 x 5 tokens."""
    return {**_texts(), **_negative_texts(), "height": 96, "width": 160, "frames": 9}


def _video_of_picture_arguments() -> dict[str, Any]:
    return {**_video_arguments(), "image": torch.sigmoid(draw(3, 1, 3, 96, 160))}


ENTRIES = [
    PipelineEntry("SanaPipeline", _build, _arguments),
    PipelineEntry("SanaSprintPipeline", _build_sprint, _sprint_arguments),
    PipelineEntry("SanaControlNetPipeline", _build_controlled, _controlled_arguments),
    PipelineEntry("SanaPAGPipeline", _build_perturbed, lambda: {**_arguments(), "pag_scale": 2.0}),
    PipelineEntry("SanaVideoPipeline", _build_video, _video_arguments),
    PipelineEntry("SanaImageToVideoPipeline", _build_video_of_picture, _video_of_picture_arguments),
]
