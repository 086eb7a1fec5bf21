"""Other pipelines that draw pictures, each with a transformer of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from omni_sp.testing.components import image_vae, qwen_image_vae
from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.pipelines.zoo.parts import pil_picture, resized, transformer
from tests.sharding.zoo.entry import draw, key_mask


def _vae() -> Any:
    """An AutoencoderKL that shrinks a side to an eighth, which most of these pipelines take for granted."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    return randomise(vae)


def _components(model: str) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _vae(),
        "transformer": transformer(model),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def _texts(prompt: tuple[int, ...] = (13, 5), negative: tuple[int, ...] = (2, 9)) -> dict[str, Any]:
    """Prompts of different length in one batch, 80 x 112 pixels: 5 x 7 tokens."""
    return {
        "prompt_embeds": draw(1, len(prompt), 13, 20),
        "prompt_attention_mask": key_mask(prompt, 13).long(),
        "negative_prompt": None,
        "negative_prompt_embeds": draw(2, len(negative), 13, 20),
        "negative_prompt_attention_mask": key_mask(negative, 13).long(),
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
    }


def _unmasked(negative_tokens: int = 13) -> dict[str, Any]:
    """For pipelines whose texts have no masks."""
    kept = {name: value for name, value in _texts().items() if not name.endswith("_mask")}
    return {**kept, "negative_prompt_embeds": draw(2, 2, negative_tokens, 20)}


def _pixart_alpha() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    components = _components("PixArtTransformer2DModel, told its size")
    return PixArtAlphaPipeline(**{**components, "scheduler": DPMSolverMultistepScheduler()})


def _pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        **{**_components("PixArtTransformer2DModel"), "scheduler": DPMSolverMultistepScheduler()}
    )


def _pixart_perturbed() -> Any:
    """Guidance away from what the model draws where one layer's tokens attend to themselves alone."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPAGPipeline

    components = {**_components("PixArtTransformer2DModel"), "scheduler": DPMSolverMultistepScheduler()}
    return PixArtSigmaPAGPipeline(**components, pag_applied_layers="blocks.1")


def _pixart_arguments() -> dict[str, Any]:
    return {**_texts(), "use_resolution_binning": False}


def _dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    # The pipeline's guidance asks for class 1000.
    small = transformer("DiTTransformer2DModel")
    model = randomise(DiTTransformer2DModel.from_config({**small.config, "num_embeds_ada_norm": 1000}))
    return DiTPipeline(transformer=model, vae=_vae(), scheduler=DDIMScheduler())


def _dit_arguments() -> dict[str, Any]:
    """It knows squares only: 5 x 5 tokens."""
    return {"class_labels": [3, 10], "guidance_scale": 3.0}


def _auraflow() -> Any:
    from diffusers import AuraFlowPipeline

    return AuraFlowPipeline(**_components("AuraFlowTransformer2DModel"))


def _cogview3() -> Any:
    from diffusers import CogVideoXDPMScheduler, CogView3PlusPipeline

    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return CogView3PlusPipeline(**{**_components("CogView3PlusTransformer2DModel"), "scheduler": scheduler})


def _cogview4() -> Any:
    from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25)
    return CogView4Pipeline(**{**_components("CogView4Transformer2DModel"), "scheduler": scheduler})


def _hunyuan_dit_components() -> dict[str, Any]:
    from diffusers import DDPMScheduler

    return {
        **_components("HunyuanDiT2DModel"),
        "scheduler": DDPMScheduler(prediction_type="v_prediction", steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _hunyuan_dit() -> Any:
    from diffusers import HunyuanDiTPipeline

    return HunyuanDiTPipeline(**_hunyuan_dit_components())


def _hunyuan_dit_perturbed() -> Any:
    from diffusers import HunyuanDiTPAGPipeline

    return HunyuanDiTPAGPipeline(**_hunyuan_dit_components(), pag_applied_layers="blocks.1")


def _hunyuan_dit_arguments() -> dict[str, Any]:
    return {
        **_texts(),
        "prompt_embeds_2": draw(3, 2, 9, 24),
        "prompt_attention_mask_2": key_mask((4, 9), 9).long(),
        "negative_prompt_embeds_2": draw(4, 2, 9, 24),
        "negative_prompt_attention_mask_2": key_mask((1, 6), 9).long(),
        "guidance_rescale": 0.5,
        "original_size": (80, 112),
        "use_resolution_binning": False,
    }


def _lumina() -> Any:
    from diffusers import LuminaPipeline

    return LuminaPipeline(**_components("LuminaNextDiT2DModel"))


def _prx() -> Any:
    from diffusers import PRXPipeline

    return PRXPipeline(**_components("PRXTransformer2DModel"))


def _prx_arguments() -> dict[str, Any]:
    """One prompt: its timesteps are made for no more."""
    texts = {**_texts((9,), (3,)), "use_resolution_binning": False}
    masks = {name: value.bool() for name, value in texts.items() if name.endswith("_mask")}
    return {**texts, **masks}


class _Words:
    """Stands in for OmniGen's tokenizer: the same number for the same word."""

    model_max_length = 256

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[3 + sum(map(ord, word)) % 40 for word in text.split()])


def _transforms() -> SimpleNamespace:
    """What OmniGen's processor wants of torchvision."""

    def compose(steps: list[Any]) -> Any:
        def apply(picture: Any) -> Any:
            for step in steps:
                picture = step(picture)
            return picture

        return apply

    def to_tensor() -> Any:
        import numpy as np

        return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    return SimpleNamespace(
        Compose=compose,
        Lambda=lambda function: function,
        ToTensor=to_tensor,
        Normalize=lambda mean, std, inplace: lambda picture: (picture - mean[0]) / std[0],
    )


def _omnigen() -> Any:
    """Its processor needs torchvision when it is made, and only then: without torchvision a stand-in serves."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

    processor = processor_omnigen.OmniGenMultiModalProcessor
    with (
        patch.object(processor_omnigen, "transforms", _transforms(), create=True),
        patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, create=True),
    ):
        return pipeline_omnigen.OmniGenPipeline(
            transformer=transformer("OmniGenTransformer2DModel"),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=_vae(),
            tokenizer=_Words(),
        )


def _omnigen_arguments() -> dict[str, Any]:
    """Words, whose lengths differ: padding stands on the left."""
    return {
        "prompt": ["a red cat", "two birds over the wide green field"],
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
    }


def _omnigen_pictures() -> dict[str, Any]:
    """One of the prompts has a picture to look at; guidance makes three samples of each."""
    from PIL import Image

    # The pipeline draws the code of a picture from torch's own generator.
    torch.manual_seed(5)
    pixels = (draw(3, 32, 48, 3).sigmoid() * 255).to(torch.uint8)
    return {
        **_omnigen_arguments(),
        "prompt": ["a red cat", "two birds over <img><|image_1|></img>"],
        "input_images": [None, [Image.fromarray(pixels.numpy())]],
    }


def _small_components(model: Any) -> dict[str, Any]:
    """With a VAE that shrinks a side to half: 20 x 28 pixels are 5 x 7 tokens."""
    return {**_components("AuraFlowTransformer2DModel"), "vae": image_vae(), "transformer": model}


def _bria() -> Any:
    from diffusers import BriaPipeline

    return BriaPipeline(**_small_components(transformer("BriaTransformer2DModel")))


def _ovis() -> Any:
    from diffusers import OvisImagePipeline

    return OvisImagePipeline(**_small_components(resized(transformer("OvisImageTransformer2DModel"), out_channels=16)))


def _small_arguments(negative_tokens: int) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 2, 13, 24),
        "negative_prompt": None,
        "negative_prompt_embeds": draw(2, 2, negative_tokens, 24),
        "guidance_scale": 3.0,
        "height": 20,
        "width": 28,
    }


def _longcat() -> Any:
    """It takes no embeddings without words: these have some as soon as they are asked for."""
    from diffusers import LongCatImagePipeline

    # Its latents always have 16 channels.
    model = resized(transformer("LongCatImageTransformer2DModel"), in_channels=64)
    pipe = LongCatImagePipeline(**{**_small_components(model), "vae": image_vae(16)}, text_processor=None)
    pipe._encode_prompt = lambda prompts: draw(len(prompts[0]), len(prompts), 3 + len(prompts[0]), 24)
    return pipe


def _longcat_arguments() -> dict[str, Any]:
    words = {
        "prompt": ["a red fox!", "snow on it"],
        "negative_prompt": ["blur", "dark"],
        "enable_prompt_rewrite": False,
    }
    return {**words, "guidance_scale": 3.0, "height": 20, "width": 28}


def _hunyuan_image() -> Any:
    """Guided by diffusers' guiders, which remember from step to step; it has no more than two forwards a step."""
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=112,
        scaling_factor=0.4,
    )
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=1)
    components = {
        **_components("HunyuanImageTransformer2DModel"),
        "vae": randomise(vae),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "guider": guider,
        "ocr_guider": guider,
    }
    return HunyuanImagePipeline(**components)


def _hunyuan_image_arguments() -> dict[str, Any]:
    """40 x 56 pixels are 5 x 7 tokens; the second text, of letters to be drawn, is empty for one of the prompts."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_embeds_mask": key_mask((13, 5), 13).long(),
        "prompt_embeds_2": draw(2, 2, 9, 12),
        "prompt_embeds_mask_2": key_mask((4, 0), 9).long(),
        "negative_prompt_embeds": draw(3, 2, 7, 20),
        "negative_prompt_embeds_mask": key_mask((2, 7), 7).long(),
        "negative_prompt_embeds_2": draw(4, 2, 9, 12),
        "negative_prompt_embeds_mask_2": key_mask((1, 3), 9).long(),
        "height": 40,
        "width": 56,
    }


def _flux2_vae(latent_channels: int) -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        mid_block_add_attention=False,
    )
    # A statistic of the latent, no parameter.
    vae.bn.running_var.mul_(2.0)
    return randomise(vae)


def _ernie() -> Any:
    from diffusers import ErnieImagePipeline

    return ErnieImagePipeline(**{**_components("ErnieImageTransformer2DModel"), "vae": _flux2_vae(2)})


def _ernie_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": [draw(1, 13, 20), draw(2, 5, 20)],
        "negative_prompt_embeds": [draw(3, 2, 20), draw(4, 7, 20)],
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
    }


class _Letters:
    """Stands in for Ideogram's tokenizer, a token for each letter."""

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        return str(messages[0]["content"][0]["text"])

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}


class _Encoder:
    """Stands in for Ideogram's text encoder, which is asked for nothing but where it is."""

    device = torch.device("cpu")


def _ideogram() -> Any:
    """A second transformer for the forwards without text. It takes no embeddings: stand-ins make them of words."""
    from diffusers import Ideogram4Pipeline

    components = {
        **_components("Ideogram4Transformer2DModel"),
        "unconditional_transformer": transformer("Ideogram4Transformer2DModel", seed=1),
        "vae": _flux2_vae(4),
        "tokenizer": _Letters(),
        "text_encoder": _Encoder(),
    }
    pipe = Ideogram4Pipeline(**components)
    pipe._get_text_encoder_hidden_states = lambda encoder, ids, *others: [draw(1, *ids.shape, 28)]
    return pipe


def _ideogram_arguments() -> dict[str, Any]:
    """Padding stands on the left, and belongs to no sample."""
    return {
        "prompt": ["a red fox", "snow"],
        "max_sequence_length": 13,
        "guidance_scale": 3.0,
        "guidance_schedule": None,
        "height": 80,
        "width": 112,
    }


def _krea() -> Any:
    from diffusers import Krea2Pipeline

    return Krea2Pipeline(**{**_components("Krea2Transformer2DModel"), "vae": qwen_image_vae()})


def _krea_arguments() -> dict[str, Any]:
    """A text of four layers of the encoder."""
    return {
        "prompt_embeds": draw(1, 2, 13, 4, 24),
        "prompt_embeds_mask": key_mask((13, 5), 13),
        "negative_prompt_embeds": draw(2, 2, 13, 4, 24),
        "negative_prompt_embeds_mask": key_mask((2, 9), 13),
        "guidance_scale": 2.0,
        "height": 80,
        "width": 112,
    }


def _nucleus() -> Any:
    from diffusers import NucleusMoEImagePipeline

    components = {**_components("NucleusMoEImageTransformer2DModel"), "vae": qwen_image_vae(), "processor": None}
    del components["tokenizer"]
    return NucleusMoEImagePipeline(**components)


def _nucleus_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "prompt_embeds_mask": key_mask((13, 5), 13).long(),
        "negative_prompt_embeds": draw(2, 2, 7, 20),
        "negative_prompt_embeds_mask": key_mask((2, 7), 7).long(),
        "guidance_scale": 3.0,
        "height": 80,
        "width": 112,
    }


def _glm() -> Any:
    from diffusers import GlmImagePipeline

    components = {
        **_small_components(transformer("GlmImageTransformer2DModel")),
        "vae": image_vae(latents_mean=[0.1] * 4, latents_std=[0.8] * 4),
        "processor": None,
        "vision_language_encoder": None,
    }
    return GlmImagePipeline(**components)


def _glm_arguments() -> dict[str, Any]:
    """40 x 28 pixels are 10 x 7 tokens, each with a number that a language model would choose."""
    return {
        "prompt_embeds": draw(1, 2, 13, 20),
        "negative_prompt_embeds": draw(2, 2, 13, 20),
        "prior_token_ids": torch.arange(140).reshape(2, 70) * 7 % 50,
        "guidance_scale": 3.0,
        "height": 40,
        "width": 28,
    }


def _glm_edit_arguments() -> dict[str, Any]:
    """The keys and values of a picture to edit, 3 x 7 tokens, are kept from a forward of its own for the later ones."""
    return {
        **_glm_arguments(),
        "image": [[pil_picture(3, 12, 28)], [pil_picture(4, 12, 28)]],
        "prior_token_image_ids": [torch.arange(21), torch.arange(21) + 5],
        "source_image_grid_thw": [torch.tensor([[1, 3, 7]])] * 2,
    }


ENTRIES = [
    PipelineEntry("PixArtAlphaPipeline", _pixart_alpha, _pixart_arguments),
    PipelineEntry("PixArtSigmaPipeline", _pixart_sigma, _pixart_arguments),
    PipelineEntry("DiTPipeline", _dit, _dit_arguments),
    PipelineEntry("AuraFlowPipeline", _auraflow, _texts),
    PipelineEntry("CogView3PlusPipeline", _cogview3, _unmasked),
    PipelineEntry("CogView4Pipeline", _cogview4, lambda: _unmasked(negative_tokens=7)),
    PipelineEntry("HunyuanDiTPipeline", _hunyuan_dit, _hunyuan_dit_arguments),
    PipelineEntry("LuminaPipeline", _lumina, _texts),
    PipelineEntry("PRXPipeline", _prx, _prx_arguments),
    PipelineEntry("OmniGenPipeline", _omnigen, _omnigen_arguments),
    PipelineEntry("OmniGenPipeline", _omnigen, _omnigen_pictures, "picture to look at"),
    PipelineEntry("PixArtSigmaPAGPipeline", _pixart_perturbed, lambda: {**_pixart_arguments(), "pag_scale": 2.0}),
    PipelineEntry(
        "HunyuanDiTPAGPipeline", _hunyuan_dit_perturbed, lambda: {**_hunyuan_dit_arguments(), "pag_scale": 2.0}
    ),
    PipelineEntry("BriaPipeline", _bria, lambda: _small_arguments(negative_tokens=13)),
    PipelineEntry("OvisImagePipeline", _ovis, lambda: _small_arguments(negative_tokens=7)),
    PipelineEntry("LongCatImagePipeline", _longcat, _longcat_arguments),
    PipelineEntry("HunyuanImagePipeline", _hunyuan_image, _hunyuan_image_arguments),
    PipelineEntry("ErnieImagePipeline", _ernie, _ernie_arguments),
    PipelineEntry("Ideogram4Pipeline", _ideogram, _ideogram_arguments),
    PipelineEntry("Krea2Pipeline", _krea, _krea_arguments),
    PipelineEntry("NucleusMoEImagePipeline", _nucleus, _nucleus_arguments),
    PipelineEntry("GlmImagePipeline", _glm, _glm_arguments),
    PipelineEntry("GlmImagePipeline", _glm, _glm_edit_arguments, "picture to edit"),
]
