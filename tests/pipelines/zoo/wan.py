"""Wan 2.1 and 2.2 beyond what qwen_flux_wan.py has: from a picture, TI2V, VACE."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import wan_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import PictureProcessor, picture, pil_picture
from tests.sharding.zoo.entry import draw
from tests.sharding.zoo.wan import IMAGE, build_wan

# Noise, the picture's latents, and a mask for each of the four frames that the VAE makes one.
_CHANNELS = 4 + 4 + 4


def _transformer(seed: int = 0, **changes: Any) -> Any:
    return randomise(build_wan("WanTransformer3DModel", **changes)(), seed=seed)


def _scheduler() -> Any:
    """As Wan's own checkpoints have it."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _video_arguments(text: int = 13, negative: int = 7, batch: int = 1) -> dict[str, Any]:
    """45 tokens."""
    return {
        "prompt_embeds": draw(1, batch, text, 20),
        "negative_prompt_embeds": draw(2, batch, negative, 20),
        "height": 48,
        "width": 80,
        "num_frames": 9,
        "guidance_scale": 4.0,
    }


def _from_picture() -> Any:
    """Wan 2.2: one transformer for the noisy steps and one for the late ones."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=_transformer(seed=1, in_channels=_CHANNELS),
        transformer_2=_transformer(seed=2, in_channels=_CHANNELS),
        boundary_ratio=0.7,
    )


def _from_picture_arguments() -> dict[str, Any]:
    """35 tokens, 5 frames of 7; two prompts."""
    return {
        **_video_arguments(batch=2),
        "height": 16,
        "width": 112,
        "num_frames": 17,
        "image": picture(3, 1, 16, 112),
        "guidance_scale_2": 3.0,
    }


def _from_encoded_picture(**changes: Any) -> Any:
    """Wan 2.1: the transformer sees the picture through CLIP as well."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=28,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=30,
            patch_size=10,
        )
    )
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=_scheduler(),
        image_processor=PictureProcessor(30),
        image_encoder=randomise(encoder),
        transformer=_transformer(in_channels=_CHANNELS, **IMAGE, **changes),
    )


def _from_encoded_picture_arguments() -> dict[str, Any]:
    """The text is 512 tokens long, always: what lies before those is the picture."""
    return {**_video_arguments(text=512, negative=512), "image": picture(3, 1, 48, 80)}


def _first_and_last() -> Any:
    return _from_encoded_picture(pos_embed_seq_len=20)


def _first_and_last_arguments() -> dict[str, Any]:
    return {**_from_encoded_picture_arguments(), "last_image": picture(4, 1, 48, 80)}


def _ti2v_vae() -> Any:
    """Of Wan 2.2 TI2V: sides to a sixteenth."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
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


def _ti2v(name: str) -> Any:
    """Each token has a timestep of its own, that of given frames is 0."""
    import diffusers

    return getattr(diffusers, name)(
        tokenizer=None,
        text_encoder=None,
        vae=_ti2v_vae(),
        scheduler=_scheduler(),
        transformer=_transformer(),
        expand_timesteps=True,
    )


def _ti2v_arguments() -> dict[str, Any]:
    return {**_video_arguments(batch=2), "height": 96, "width": 160}


def _ti2v_from_picture_arguments() -> dict[str, Any]:
    return {**_ti2v_arguments(), "image": picture(3, 1, 96, 160)}


def _vace() -> Any:
    from diffusers import WanVACEPipeline

    # Latents of what stays and of what changes, and an 8 × 8 mask for each of them.
    transformer = build_wan("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=4 + 4 + 64)()
    return WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=_scheduler(),
        transformer=randomise(transformer),
    )


def _vace_arguments() -> dict[str, Any]:
    """35 tokens: 4 frames of 7, and a reference picture, which is one more."""
    return {
        **_video_arguments(),
        "height": 16,
        "width": 112,
        "num_frames": 13,
        "video": picture(3, 13, 16, 112)[None],
        "mask": picture(4, 13, 16, 112)[None].round(),
        "reference_images": pil_picture(5, 24, 72),
        "conditioning_scale": [1.0, 0.7],
    }


ENTRIES = [
    PipelineEntry("WanImageToVideoPipeline", _from_picture, _from_picture_arguments),
    PipelineEntry("WanImageToVideoPipeline", _from_encoded_picture, _from_encoded_picture_arguments, "CLIP"),
    PipelineEntry("WanImageToVideoPipeline", _first_and_last, _first_and_last_arguments, "first and last picture"),
    PipelineEntry(
        "WanImageToVideoPipeline",
        lambda: _ti2v("WanImageToVideoPipeline"),
        _ti2v_from_picture_arguments,
        "timestep per token",
    ),
    PipelineEntry("WanPipeline", lambda: _ti2v("WanPipeline"), _ti2v_arguments, "timestep per token"),
    PipelineEntry("WanVACEPipeline", _vace, _vace_arguments),
]
