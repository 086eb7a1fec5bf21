"""CogVideoX from text and from a picture, 1.0 and 1.5."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import picture
from tests.sharding.zoo.cogvideo import build_first, build_rotary, build_second
from tests.sharding.zoo.entry import draw


def _vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return randomise(vae)


def _pipeline(name: str, transformer: Any, scheduler: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(
        tokenizer=None,
        text_encoder=None,
        vae=_vae(),
        transformer=randomise(transformer),
        scheduler=getattr(diffusers, scheduler)(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


def _arguments() -> dict[str, Any]:
    """35 tokens, 5 frames of 7; the pipeline takes texts of one length only, and no mask."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "negative_prompt_embeds": draw(2, 2, 13, 20),
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "height": 16,
        "width": 112,
        "num_frames": 17,
    }


def _from_picture_arguments() -> dict[str, Any]:
    """45 tokens: learned positions are for one size only."""
    return {**_arguments(), "image": picture(3, 2, 48, 80), "height": 48, "width": 80, "num_frames": 9}


def _second_arguments() -> dict[str, Any]:
    """5 latent frames and one of padding make 3 patches in time."""
    return {**_from_picture_arguments(), "num_frames": 17}


ENTRIES = [
    PipelineEntry(
        "CogVideoXPipeline",
        lambda: _pipeline("CogVideoXPipeline", build_first(), "CogVideoXDDIMScheduler"),
        _arguments,
    ),
    PipelineEntry(
        "CogVideoXImageToVideoPipeline",
        lambda: _pipeline("CogVideoXImageToVideoPipeline", build_rotary(), "CogVideoXDPMScheduler"),
        _from_picture_arguments,
    ),
    PipelineEntry(
        "CogVideoXImageToVideoPipeline",
        lambda: _pipeline("CogVideoXImageToVideoPipeline", build_second(), "CogVideoXDPMScheduler"),
        _second_arguments,
        "1.5",
    ),
]
