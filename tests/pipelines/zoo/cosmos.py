"""Cosmos: text to world, and the second generation's text to image."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import wan_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.sharding.zoo.cosmos import build_cosmos
from tests.sharding.zoo.entry import draw


class _SafetyChecker:
    """Stands in for Cosmos' guardrail, without which the pipelines refuse to run."""

    def to(self, *places: Any) -> None:
        """It has no weights."""


def _world() -> Any:
    from diffusers import AutoencoderKLCosmos, CosmosTextToWorldPipeline, EDMEulerScheduler

    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    return CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_cosmos()()),
        vae=randomise(vae),
        scheduler=EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        safety_checker=_SafetyChecker(),
    )


def _image() -> Any:
    from diffusers import Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler

    return Cosmos2TextToImagePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(build_cosmos()()),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=_SafetyChecker(),
    )


def _arguments() -> dict[str, Any]:
    """35 tokens a frame. The pipelines round pictures to 8 bit for the safety checker, so latents are compared."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "negative_prompt_embeds": draw(2, 2, 7, 20),
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
        "output_type": "latent",
    }


ENTRIES = [
    PipelineEntry("CosmosTextToWorldPipeline", _world, lambda: {**_arguments(), "num_frames": 33}),
    PipelineEntry("Cosmos2TextToImagePipeline", _image, _arguments),
]
