"""Pipelines with ControlNets, whose residuals are added to the transformer's tokens."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.components import image_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.flux import flux_parts, flux_prompts
from tests.pipelines.zoo.parts import clear_qwen_vae, resized, transformer
from tests.pipelines.zoo.z_image import z_image_arguments, z_image_parts
from tests.sharding.zoo.entry import draw, key_mask


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _deep_vae(levels: int) -> Any:
    """Each level but the first halves a side."""
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels,
    }
    return resized(image_vae(), **blocks)


def _control_image(seed: int, height: int = 20, width: int = 28) -> torch.Tensor:
    return draw(seed, 1, 3, height, width).tanh()


def qwen_pipeline(several: bool = False) -> Any:
    """With one residual for two blocks."""
    from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline, QwenImageMultiControlNetModel

    model = transformer("QwenImageTransformer2DModel")
    controlnet = resized(model, QwenImageControlNetModel, 1, num_layers=1)
    return QwenImageControlNetPipeline(
        scheduler=_scheduler(),
        vae=clear_qwen_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        controlnet=QwenImageMultiControlNetModel([controlnet]) if several else controlnet,
    )


def qwen_arguments() -> dict[str, Any]:
    """5 x 7 tokens, two prompts of different length, negative ones of other lengths."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_embeds_mask": key_mask((13, 5), 13),
        "negative_prompt_embeds": draw(2, 2, 3, 20),
        "negative_prompt_embeds_mask": key_mask((2, 3), 3),
        "true_cfg_scale": 3.0,
        "control_image": _control_image(3, 80, 112),
        "controlnet_conditioning_scale": 0.8,
        "height": 80,
        "width": 112,
    }


def qwen_union_arguments() -> dict[str, Any]:
    """Two pictures for one ControlNet; the second ends with the second step."""
    return {
        **qwen_arguments(),
        "control_image": [_control_image(3, 80, 112), _control_image(4, 80, 112)],
        "controlnet_conditioning_scale": [0.8, 0.5],
        "control_guidance_end": [1.0, 0.7],
    }


def flux_pipeline(*controlnets: dict[str, Any]) -> Any:
    """With one ControlNet, or with several."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxMultiControlNetModel

    parts = flux_parts()
    nets = [resized(parts["transformer"], FluxControlNetModel, 1 + i, **net) for i, net in enumerate(controlnets)]
    return FluxControlNetPipeline(**parts, controlnet=nets[0] if len(nets) == 1 else FluxMultiControlNetModel(nets))


def flux_hint_pipeline() -> Any:
    """This kind of ControlNet takes the picture itself, at an eighth, and its residuals go round and round."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    parts = flux_parts()
    sizes = {"num_layers": 1, "num_single_layers": 0, "patch_size": 2, "conditioning_embedding_channels": 4}
    controlnet = resized(parts["transformer"], FluxControlNetModel, 1, **sizes)
    # The hint block shrinks a side to an eighth, so the latent has to be as small.
    parts["vae"] = _deep_vae(4)
    return FluxControlNetPipeline(**parts, controlnet=controlnet)


def flux_arguments() -> dict[str, Any]:
    """5 x 7 tokens, two prompts with negative ones."""
    return {
        **flux_prompts(),
        "control_image": _control_image(5),
        "controlnet_conditioning_scale": 0.8,
        "height": 20,
        "width": 28,
    }


def flux_two_arguments() -> dict[str, Any]:
    """The second of two is a union, which is told its mode, and ends with the second step."""
    return {
        **flux_arguments(),
        "control_image": [_control_image(5), _control_image(6)],
        "control_mode": [None, 2],
        "controlnet_conditioning_scale": [0.8, 0.5],
        "control_guidance_end": [1.0, 0.7],
    }


def flux_hint_arguments() -> dict[str, Any]:
    return {**flux_arguments(), "control_image": _control_image(5, 80, 112), "height": 80, "width": 112}


def sd3_pipeline(several: bool = False) -> Any:
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    model = transformer("SD3Transformer2DModel")
    # Two residuals for three blocks, of which the last takes none.
    nets = [resized(model, SD3ControlNetModel, seed, num_layers=2) for seed in ((1, 2) if several else (1,))]
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return StableDiffusion3ControlNetPipeline(
        scheduler=_scheduler(),
        vae=_deep_vae(3),
        transformer=model,
        controlnet=nets if several else nets[0],
        **dict.fromkeys(names),
    )


def sd3_arguments() -> dict[str, Any]:
    """5 x 7 tokens, two prompts with negative ones in the same batch; a side must be divisible by 8."""
    # This pipeline draws the latent of the control picture from torch's own generator, not from the one it is given.
    torch.manual_seed(8)
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "pooled_prompt_embeds": draw(2, 2, 12),
        "negative_prompt_embeds": draw(3, 2, 13, 20),
        "negative_pooled_prompt_embeds": draw(4, 2, 12),
        "guidance_scale": 3.0,
        "control_image": _control_image(5, 40, 56),
        "controlnet_conditioning_scale": 0.8,
        "height": 40,
        "width": 56,
    }


def sd3_two_arguments() -> dict[str, Any]:
    return {
        **sd3_arguments(),
        "control_image": [_control_image(5, 40, 56), _control_image(6, 40, 56)],
        "controlnet_conditioning_scale": [0.8, 0.5],
    }


def z_image_pipeline(refiner: str | None = None) -> Any:
    """Its ControlNet runs embedders and refiners of the transformer itself."""
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline

    sizes = {"dim": 36, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3}
    controlnet = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0, 1] if refiner == "control_noise_refiner" else [0],
        control_in_dim=4,
        add_control_noise_refiner=refiner,
        **sizes,
    )
    return ZImageControlNetPipeline(**z_image_parts(), controlnet=randomise(controlnet, 1))


def z_image_control_arguments() -> dict[str, Any]:
    return {**z_image_arguments(), "control_image": _control_image(5), "controlnet_conditioning_scale": 0.8}


ENTRIES = [
    PipelineEntry("QwenImageControlNetPipeline", qwen_pipeline, qwen_arguments),
    PipelineEntry(
        "QwenImageControlNetPipeline",
        lambda: qwen_pipeline(several=True),
        qwen_union_arguments,
        "two pictures for one ControlNet",
    ),
    PipelineEntry("FluxControlNetPipeline", lambda: flux_pipeline({"num_layers": 1}), flux_arguments),
    PipelineEntry(
        "FluxControlNetPipeline",
        lambda: flux_pipeline({"num_layers": 1}, {"num_single_layers": 1, "num_mode": 3}),
        flux_two_arguments,
        "two ControlNets",
    ),
    PipelineEntry("FluxControlNetPipeline", flux_hint_pipeline, flux_hint_arguments, "with a hint block"),
    PipelineEntry("StableDiffusion3ControlNetPipeline", sd3_pipeline, sd3_arguments),
    PipelineEntry(
        "StableDiffusion3ControlNetPipeline",
        lambda: sd3_pipeline(several=True),
        sd3_two_arguments,
        "two ControlNets",
    ),
    PipelineEntry("ZImageControlNetPipeline", z_image_pipeline, z_image_control_arguments),
    PipelineEntry(
        "ZImageControlNetPipeline",
        lambda: z_image_pipeline("control_noise_refiner"),
        z_image_control_arguments,
        "refined",
    ),
]
