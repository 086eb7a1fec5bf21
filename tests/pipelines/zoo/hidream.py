"""HiDream: a text of many layers, experts, a picture that is filled up to a square's worth of tokens."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import image_vae
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import transformer
from tests.sharding.zoo.entry import draw

_NAME = "HiDreamImageTransformer2DModel"


def _build(model: str = _NAME) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline

    names = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")]
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(),
        transformer=transformer(model),
        **dict.fromkeys(names),
    )
    # It draws as many pixels as a square of this side has, whatever it is asked for.
    pipe.default_sample_size = 12
    return pipe


def _arguments(height: int = 20, width: int = 28) -> dict[str, Any]:
    """20 x 28 pixels are 35 tokens, filled up to 42."""
    return {
        "prompt_embeds_t5": draw(1, 2, 13, 20),
        "prompt_embeds_llama3": draw(2, 3, 2, 11, 28),
        "pooled_prompt_embeds": draw(3, 2, 12),
        "negative_prompt_embeds_t5": draw(4, 2, 13, 20),
        "negative_prompt_embeds_llama3": draw(5, 3, 2, 11, 28),
        "negative_pooled_prompt_embeds": draw(6, 2, 12),
        "guidance_scale": 3.0,
        "height": height,
        "width": width,
    }


ENTRIES = [
    PipelineEntry("HiDreamImagePipeline", _build, _arguments),
    PipelineEntry("HiDreamImagePipeline", _build, lambda: _arguments(24, 24), "square"),
    PipelineEntry("HiDreamImagePipeline", lambda: _build(f"{_NAME}, no experts"), _arguments, "no experts"),
]
