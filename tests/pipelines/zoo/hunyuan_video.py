"""HunyuanVideo and HunyuanVideo 1.5, from text and from a picture."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import PictureProcessor, picture, pil_picture
from tests.sharding.zoo.entry import draw, key_mask
from tests.sharding.zoo.hunyuan import build_video, build_video15


def _vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return randomise(vae)


def _video() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_video()),
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _video_arguments() -> dict[str, Any]:
    """Two prompts of different length, true CFG with shorter negative ones; 35 tokens, 5 frames of 7."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_attention_mask": key_mask((13, 5), 13).long(),
        "pooled_prompt_embeds": draw(2, 2, 12),
        "negative_prompt_embeds": draw(3, 2, 7, 20),
        "negative_prompt_attention_mask": key_mask((4, 7), 7).long(),
        "negative_pooled_prompt_embeds": draw(4, 2, 12),
        "true_cfg_scale": 4.0,
        "guidance_scale": 6.0,
        "height": 16,
        "width": 112,
        "num_frames": 17,
    }


def _from_picture(condition: str, in_channels: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline

    return HunyuanVideoImageToVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_video(condition, in_channels)),
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
    )


def _from_picture_arguments() -> dict[str, Any]:
    return {**_video_arguments(), "image": picture(5, 2, 16, 112), "guidance_scale": 1.0}


def _vae15() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo15

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4
    )
    vae.enable_slicing()  # its attention takes one video at a time
    return randomise(vae)


def _video15() -> Any:
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline

    return HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_video15(use_meanflow=False)),
        vae=_vae15(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )


def _text15() -> dict[str, Any]:
    """Two prompts of different length; only one of them asks for letters in the picture, which ByT5 reads."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_embeds_mask": key_mask((13, 5), 13).long(),
        "prompt_embeds_2": draw(2, 2, 9, 12),
        "prompt_embeds_mask_2": key_mask((4, 0), 9).long(),
        "negative_prompt_embeds": draw(3, 2, 7, 20),
        "negative_prompt_embeds_mask": key_mask((4, 7), 7).long(),
        "negative_prompt_embeds_2": draw(4, 2, 9, 12),
        "negative_prompt_embeds_mask_2": key_mask((0, 0), 9).long(),
    }


def _video15_arguments() -> dict[str, Any]:
    """175 tokens, 5 frames of 5 × 7."""
    return {**_text15(), "height": 20, "width": 28, "num_frames": 17}


def _from_picture15() -> Any:
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, HunyuanVideo15ImageToVideoPipeline
    from transformers import SiglipVisionConfig, SiglipVisionModel

    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=30,
            patch_size=10,
        )
    )
    return HunyuanVideo15ImageToVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_video15(target_size=24)),
        vae=_vae15(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        image_encoder=randomise(encoder),
        feature_extractor=PictureProcessor(30),
    )


def _from_picture15_arguments() -> dict[str, Any]:
    """The size comes from the picture's sides and the transformer's target: 20 × 28."""
    return {**_text15(), "image": pil_picture(5, 20, 28), "num_frames": 17}


ENTRIES = [
    PipelineEntry("HunyuanVideoPipeline", _video, _video_arguments),
    PipelineEntry(
        "HunyuanVideoImageToVideoPipeline",
        lambda: _from_picture("token_replace", 4),
        _from_picture_arguments,
        "the picture's tokens replace the first frame's",
    ),
    PipelineEntry(
        "HunyuanVideoImageToVideoPipeline",
        lambda: _from_picture("latent_concat", 4 + 4 + 1),
        _from_picture_arguments,
        "the picture as further channels",
    ),
    PipelineEntry("HunyuanVideo15Pipeline", _video15, _video15_arguments),
    PipelineEntry("HunyuanVideo15ImageToVideoPipeline", _from_picture15, _from_picture15_arguments),
]
