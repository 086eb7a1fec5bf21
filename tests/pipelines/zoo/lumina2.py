"""Lumina 2: sequences of text and picture whose length differs by sample, guidance that is scaled back."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import image_vae
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import transformer
from tests.sharding.zoo.entry import draw, key_mask


def _build() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    # The pipeline reckons with an eighth, whatever the VAE does.
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer("Lumina2Transformer2DModel"),
    )


def _arguments(lengths: tuple[int, int] = (13, 5), negative_lengths: tuple[int, int] = (4, 9)) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_attention_mask": key_mask(lengths, 13).long(),
        "negative_prompt_embeds": draw(2, 2, 13, 20),
        "negative_prompt_attention_mask": key_mask(negative_lengths, 13).long(),
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
    }


ENTRIES = [
    PipelineEntry("Lumina2Pipeline", _build, _arguments),
    PipelineEntry("Lumina2Pipeline", _build, lambda: _arguments((13, 13), (13, 13)), "texts of one length"),
    # The last steps do without guidance.
    PipelineEntry("Lumina2Pipeline", _build, lambda: {**_arguments(), "cfg_trunc_ratio": 0.5}, "guidance cut short"),
]
