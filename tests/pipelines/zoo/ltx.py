"""LTX-Video from text and with given frames, LTX-2 and LTX-2.3: video and sound."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import LTX_VAE, ltx_vae, transformer
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import picture
from tests.sharding.zoo.entry import draw, key_mask
from tests.sharding.zoo.ltx2 import SECOND, build_ltx2


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05)


def _ltx(name: str) -> Any:
    import diffusers

    scheduler = _scheduler() if name == "LTXPipeline" else diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, name)(
        scheduler=scheduler,
        vae=ltx_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer("LTXVideoTransformer3DModel")),
    )


def _arguments(batch: int = 2) -> dict[str, Any]:
    """Prompts of different length, which the pipeline draws with and without guidance in one batch; 175 tokens."""
    return {
        "prompt_embeds": draw(1, batch, 13, 20),
        "prompt_attention_mask": key_mask((13, 5)[:batch], 13),
        "negative_prompt_embeds": draw(2, batch, 13, 20),
        "negative_prompt_attention_mask": key_mask((4, 7)[:batch], 13),
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "height": 160,
        "width": 224,
        "num_frames": 9,
        "decode_timestep": 0.05,
        "decode_noise_scale": 0.025,
    }


def _condition_arguments() -> dict[str, Any]:
    """The first frame is given, and a picture for the last one, whose tokens come before: 4 and 1 frames of 35."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return {
        **_arguments(batch=1),
        "num_frames": 7,
        "conditions": [
            LTXVideoCondition(image=picture(3, 1, 160, 224), frame_index=0, strength=1.0),
            LTXVideoCondition(image=picture(4, 1, 160, 224), frame_index=6, strength=0.8),
        ],
    }


def _from_picture_arguments() -> dict[str, Any]:
    return {**_arguments(), "image": picture(3, 2, 160, 224)}


def _ltx2(transformer: dict[str, Any], connectors: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Pipeline
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vae = AutoencoderKLLTX2Video(**LTX_VAE, down_block_types=("LTX2VideoDownBlock3D",), downsample_type=("spatial",))
    # 3 channels of 2 frequencies are the 6 numbers of a token of sound.
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=6, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=3, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return LTX2Pipeline(
        scheduler=_scheduler(),
        vae=randomise(vae),
        audio_vae=randomise(audio_vae),
        text_encoder=None,
        tokenizer=None,
        connectors=randomise(LTX2TextConnectors(caption_channels=20, text_proj_in_factor=2, **connectors)),
        transformer=randomise(build_ltx2(**transformer)()),
        vocoder=randomise(vocoder),
    )


def _ltx2_first() -> Any:
    """Without registers, which would fill the padding: so the mask reaches the transformer."""
    heads: dict[str, Any] = {}
    for kind in ("video", "audio"):
        heads |= {
            f"{kind}_connector_num_attention_heads": 2,
            f"{kind}_connector_attention_head_dim": 10,
            f"{kind}_connector_num_layers": 1,
            f"{kind}_connector_num_learnable_registers": None,
        }
    return _ltx2({}, heads)


def _ltx2_second() -> Any:
    """2.3: each modality has a projection of the text of its own."""
    connectors: dict[str, Any] = {
        "per_modality_projections": True,
        "video_hidden_dim": 48,
        "audio_hidden_dim": 24,
        "rope_type": "split",
        "proj_bias": True,
    }
    for kind, width in (("video", 48), ("audio", 24)):
        connectors |= {
            f"{kind}_connector_num_attention_heads": 3,
            f"{kind}_connector_attention_head_dim": width // 3,
            f"{kind}_connector_num_layers": 1,
            f"{kind}_connector_num_learnable_registers": 13,
            f"{kind}_gated_attn": True,
        }
    return _ltx2(SECOND, connectors)


def _ltx2_arguments() -> dict[str, Any]:
    """175 tokens of video, 11 of sound; the text is padded on the left, and has two layers of its encoder."""
    return {
        **_arguments(),
        "prompt_embeds": draw(1, 2, 13, 40),
        "prompt_attention_mask": key_mask((13, 5), 13).flip(1).long(),
        "negative_prompt_embeds": draw(2, 2, 13, 40),
        "negative_prompt_attention_mask": key_mask((4, 7), 13).flip(1).long(),
        "frame_rate": 20.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "use_cross_timestep": False,
    }


def _ltx2_second_arguments() -> dict[str, Any]:
    """Guided by the text, by what skips an attention, and by what keeps video and sound apart.

    Latents are compared: among them sound counts, where pixels would drown it.
    """
    return {
        **_ltx2_arguments(),
        "stg_scale": 1.0,
        "audio_stg_scale": 1.0,
        "spatio_temporal_guidance_blocks": [1],
        "use_cross_timestep": True,
        "output_type": "latent",
    }


ENTRIES = [
    PipelineEntry("LTXPipeline", lambda: _ltx("LTXPipeline"), _arguments),
    PipelineEntry("LTXConditionPipeline", lambda: _ltx("LTXConditionPipeline"), _condition_arguments),
    PipelineEntry("LTXImageToVideoPipeline", lambda: _ltx("LTXImageToVideoPipeline"), _from_picture_arguments),
    PipelineEntry("LTX2Pipeline", _ltx2_first, _ltx2_arguments, transformers="5.5"),
    PipelineEntry("LTX2Pipeline", _ltx2_second, _ltx2_second_arguments, "2.3", transformers="5.5"),
]
