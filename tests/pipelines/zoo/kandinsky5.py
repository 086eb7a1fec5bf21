"""Kandinsky 5: videos and pictures; its queries and keys are rounded to bfloat16 whatever the dtype."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import image_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import picture, resized, transformer
from tests.sharding.zoo.entry import draw

_MODEL = "Kandinsky5Transformer3DModel"


def _video_vae() -> Any:
    """HunyuanVideo's VAE: sides to an eighth, frames to a quarter."""
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return randomise(vae)


def _components(vae: Any, model: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "transformer": model,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    }


def _build_video() -> Any:
    from diffusers import Kandinsky5T2VPipeline

    return Kandinsky5T2VPipeline(**_components(_video_vae(), transformer(_MODEL)))


def _build_sparse_video() -> Any:
    """Nabla: attention under a mask of 8 x 8 blocks that the model finds itself."""
    from diffusers import Kandinsky5T2VPipeline
    from diffusers.models.attention_dispatch import AttentionBackendName

    window = {"attention_wT": 1, "attention_wH": 1, "attention_wW": 1}
    model = resized(transformer(_MODEL), attention_type="nabla", attention_P=0.5, **window)
    # Not set_attention_backend(), which chooses for every other model of the process, too.
    for processor in model.attn_processors.values():
        processor._attention_backend = AttentionBackendName.FLEX
    return Kandinsky5T2VPipeline(**_components(_video_vae(), model))


def _build_picture() -> Any:
    from diffusers import Kandinsky5T2IPipeline

    # For videos it takes a given first frame beside the noise, for pictures it does not.
    pipe = Kandinsky5T2IPipeline(**_components(image_vae(), resized(transformer(_MODEL), visual_cond=False)))
    # It draws at one of these sizes, whatever it is asked for.
    pipe.resolutions = [(112, 80)]
    return pipe


def _build_edited_picture() -> Any:
    from diffusers import Kandinsky5I2IPipeline

    # Here a side must truly shrink to an eighth.
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = resized(image_vae(), block_out_channels=(8,) * 4, **blocks)
    pipe = Kandinsky5I2IPipeline(**_components(vae, transformer(_MODEL)))
    pipe.resolutions = [(112, 80)]
    return pipe


def _build_video_of_picture() -> Any:
    from diffusers import Kandinsky5I2VPipeline

    return Kandinsky5I2VPipeline(**_components(_video_vae(), transformer(_MODEL)))


def _texts() -> dict[str, Any]:
    """Two prompts in one batch; the model sees the padding, and the lengths say where the positions end."""
    return {
        "prompt_embeds_qwen": draw(1, 2, 13, 20),
        "prompt_embeds_clip": draw(2, 2, 12),
        "prompt_cu_seqlens": torch.tensor([0, 13, 18], dtype=torch.int32),
        "negative_prompt_embeds_qwen": draw(3, 2, 7, 20),
        "negative_prompt_embeds_clip": draw(4, 2, 12),
        "negative_prompt_cu_seqlens": torch.tensor([0, 2, 9], dtype=torch.int32),
        "guidance_scale": 3.0,
    }


def _video_arguments() -> dict[str, Any]:
    """3 latent frames of 3 x 5 tokens."""
    return {**_texts(), "height": 48, "width": 80, "num_frames": 9}


def _sparse_arguments() -> dict[str, Any]:
    """3 latent frames of 8 x 8 tokens: blocks must be full. The VAE would take longer than all else."""
    return {**_texts(), "height": 128, "width": 128, "num_frames": 9, "output_type": "latent"}


def _picture_arguments() -> dict[str, Any]:
    return {**_texts(), "height": 80, "width": 112}


# The model rounds its queries and keys to bfloat16, which another order of additions can tip over: over ten seeds the
# errors were 4e-7 where none tipped over, and up to 2e-5 where one did.
_ROUNDED = 1e-4

ENTRIES = [
    PipelineEntry("Kandinsky5T2VPipeline", _build_video, _video_arguments, error=_ROUNDED),
    PipelineEntry("Kandinsky5T2VPipeline", _build_sparse_video, _sparse_arguments, "nabla", error=_ROUNDED),
    PipelineEntry(
        "Kandinsky5I2VPipeline",
        _build_video_of_picture,
        # It takes the statistics of the first four latent frames from those behind them.
        lambda: {**_video_arguments(), "image": picture(5, 2, 48, 80), "num_frames": 17},
        error=_ROUNDED,
    ),
    PipelineEntry("Kandinsky5T2IPipeline", _build_picture, _picture_arguments, error=_ROUNDED),
    PipelineEntry(
        "Kandinsky5I2IPipeline",
        _build_edited_picture,
        lambda: {**_picture_arguments(), "image": picture(5, 2, 80, 112)},
        error=_ROUNDED,
    ),
]
