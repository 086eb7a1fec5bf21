"""Tiny models with random weights, saved to a folder as users have them: tokenizer and text encoders included.

    python -m omni_sp.testing.models flux-kontext tiny-kontext      # then: examples/image_edit.py --model tiny-kontext
    python -m omni_sp.testing.models --list                         # all families

They are small, need no download, and answer in seconds. What they draw or write has no meaning.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from omni_sp.errors import ConfigError
from omni_sp.pipelines.shapes import shapes_folder
from omni_sp.testing.components import (
    VOCABULARY_SIZE,
    clip_text_encoder,
    image_vae,
    ltx_vae,
    qwen_image_vae,
    t5_text_encoder,
    tokenizer,
    transformer,
    wan_vae,
)
from omni_sp.testing.reference import randomise

_LANGUAGE_MODELS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CONTEXT_LENGTH = 256
_MARK = ".omni-sp-tiny-model"  # a file beside a model that the command line has saved
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}make"


def save_language_model(kind: str, folder: Path, *, num_key_value_heads: int = 2) -> Any:
    """Save a decoder of two layers and four heads, with its tokenizer and a chat template.

    Args:
        kind: "llama", "mistral", "qwen2" or "qwen3".
        folder: where to.
        num_key_value_heads: how many heads of keys and values share the four heads of queries: 1, 2 or 4.

    Returns:
        The same model as transformers runs it.
    """
    import transformers

    name = _LANGUAGE_MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**_sizes(num_key_value_heads))
    return _save_with_tokenizer(getattr(transformers, f"{name}ForCausalLM")(config), folder)


def save_swiftkv_model(
    kind: str,
    folder: Path,
    *,
    num_key_value_heads: int = 2,
    num_layers: int = 4,
    num_key_value_layers: int = 2,
    key_value_group_size: int = 1,
    with_replaced: bool = False,
) -> Any:
    """Save a SwiftKV decoder, as `save_language_model` saves one without.

    Args:
        kind: "llama", "qwen2" or "qwen3".
        folder: where to.
        num_key_value_heads: as of `save_language_model`.
        num_layers: number of layers.
        num_key_value_layers: how many of them, the first ones, have keys and values of their own.
        key_value_group_size: how many of the others share keys and values.
        with_replaced: let the file also hold the matrices that the late layers had before, as some checkpoints do.

    Returns:
        The same model in plain transformers, without skipping anything.
    """
    from safetensors.torch import load_file, save_file

    from omni_sp.llm.swiftkv import config as configs
    from omni_sp.llm.swiftkv import reference

    name = _LANGUAGE_MODELS[kind]
    config = getattr(configs, f"{name}SwiftKVConfig")(
        **_sizes(num_key_value_heads) | {"num_hidden_layers": num_layers},
        num_key_value_layers=num_key_value_layers,
        key_value_group_size=key_value_group_size,
    )
    model = _save_with_tokenizer(getattr(reference, f"{name}SwiftKVForCausalLM")(config), folder)
    if with_replaced:
        path = folder / "model.safetensors"
        weights = load_file(path)
        for index in range(num_key_value_layers, num_layers):
            for part in [part for part in weights if part.startswith("model.layers.0.self_attn.")]:
                weights.setdefault(part.replace("layers.0.", f"layers.{index}."), weights[part].clone())
        save_file(weights, path, metadata={"format": "pt"})
    return model


def _sizes(num_key_value_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,  # heads of 32 numbers: the fewest that vLLM's kernels for CPUs know
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": _CONTEXT_LENGTH,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _save_with_tokenizer(model: Any, folder: Path) -> Any:
    """Draw a model's weights, save it with a tokenizer and a chat template, and return it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.3 * random if is_norm else 0.15 * random)
    model.save_pretrained(folder)
    words = tokenizer(_CONTEXT_LENGTH)
    words.chat_template = _CHAT_TEMPLATE
    words.save_pretrained(folder)
    return model


def memory_of_rank(model: Any) -> dict[str, int]:
    """Bytes that one rank of vLLM keeps for a language model.

    Args:
        model: vLLM's model of this rank.

    Returns:
        "matrices": the decoder's matrices; "weights": all weights; "kept_per_token": keys and values of one token.
    """
    matrices = weights = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        weights += parameter.nbytes
        matrices += parameter.nbytes if "_proj" in name and name.endswith(".weight") else 0
    # Layers that read another's cache keep nothing; others, and modules that are no attention layers, name none.
    attentions = [one for one in model.modules() if getattr(one, "kv_sharing_target_layer_name", "none") is None]
    kept = sum(2 * attention.num_kv_heads * attention.head_size * 4 for attention in attentions)
    return {"matrices": matrices, "weights": weights, "kept_per_token": kept}


def save_flux(folder: Path) -> None:
    """Save FLUX.1, which draws a picture from a text."""
    from diffusers import FluxPipeline

    FluxPipeline(**_flux_components(num_levels=4)).save_pretrained(folder)


def save_flux_kontext(folder: Path, *, num_levels: int = 4) -> None:
    """Save FLUX.1 Kontext, which edits pictures.

    Args:
        folder: where to.
        num_levels: of the VAE, which halves a side once less often: with 2, small pictures have many tokens.
    """
    from diffusers import FluxKontextPipeline

    FluxKontextPipeline(**_flux_components(num_levels)).save_pretrained(folder)


def save_qwen_image(folder: Path) -> None:
    """Save Qwen-Image, which draws a picture from a text, with the tokens of the demo model."""
    from diffusers import QwenImagePipeline

    QwenImagePipeline(**_qwen_components()).save_pretrained(folder)


def save_qwen_image_edit(folder: Path) -> None:
    """Save Qwen-Image-Edit, which edits pictures that its text encoder sees as well.

    Raises:
        ConfigError: torchvision, which transformers' processor of pictures needs, is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("the processor of Qwen-Image-Edit needs torchvision: pip install torchvision")
    from diffusers import QwenImageEditPipeline
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    parts = _qwen_components()
    sizes = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=parts["tokenizer"],
        video_processor=Qwen2VLVideoProcessor(**sizes),
    )
    QwenImageEditPipeline(**parts, processor=processor).save_pretrained(folder)


def save_sd3(folder: Path) -> None:
    """Save Stable Diffusion 3, whose text two CLIPs and a T5 encode."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    words, long = tokenizer(16), tokenizer(512)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(num_levels=4),
        text_encoder=clip_text_encoder(words, 8, 5),
        tokenizer=words,
        text_encoder_2=clip_text_encoder(words, 12, 7, seed=1),
        tokenizer_2=words,
        text_encoder_3=t5_text_encoder(long, 20),
        tokenizer_3=long,
        transformer=randomise(transformer("SD3Transformer2DModel")),
    ).save_pretrained(folder)


def save_z_image(folder: Path) -> None:
    """Save Z-Image, whose text a language model encodes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    words = tokenizer(512)
    words.chat_template = _CHAT_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
    )
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(num_levels=4),
        text_encoder=randomise(Qwen3Model(config)),
        tokenizer=words,
        transformer=randomise(transformer("ZImageTransformer2DModel")),
    ).save_pretrained(folder)


def save_ltx(folder: Path) -> None:
    """Save LTX-Video, which makes a video from a text."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    words = tokenizer(512)
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=ltx_vae(),
        text_encoder=t5_text_encoder(words, 20),
        tokenizer=words,
        transformer=randomise(transformer("LTXVideoTransformer3DModel")),
    ).save_pretrained(folder)


def save_wan(folder: Path) -> None:
    """Save Wan 2.2 for text to video, with a transformer for the noisy steps and one for the others."""
    from diffusers import WanPipeline

    WanPipeline(**_wan_components(in_channels=4), boundary_ratio=0.9).save_pretrained(folder)


def save_wan_i2v(folder: Path) -> None:
    """Save Wan 2.2 for image to video: its transformers take the first frame and its mask as further channels."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(**_wan_components(in_channels=12), boundary_ratio=0.9).save_pretrained(folder)


def _flux_components(num_levels: int) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    words, long = tokenizer(16), tokenizer(512)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": image_vae(num_levels=num_levels),
        "text_encoder": clip_text_encoder(words, 20),
        "tokenizer": words,
        "text_encoder_2": t5_text_encoder(long, 24),
        "tokenizer_2": long,
        "transformer": randomise(transformer("FluxTransformer2DModel")),
    }


def _qwen_components() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(shapes_folder() / "text_encoder")
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": qwen_image_vae(),
        "text_encoder": randomise(Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": AutoTokenizer.from_pretrained(shapes_folder() / "tokenizer"),
        "transformer": randomise(
            transformer("QwenImageTransformer2DModel", joint_attention_dim=config.text_config.hidden_size)
        ),
    }


def _wan_components(in_channels: int) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler

    words = tokenizer(512)
    return {
        "tokenizer": words,
        "text_encoder": t5_text_encoder(words, 20, multilingual=True),
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": randomise(transformer("WanTransformer3DModel", in_channels=in_channels), seed=1),
        "transformer_2": randomise(transformer("WanTransformer3DModel", in_channels=in_channels), seed=2),
    }


MODELS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flux": ("FluxPipeline: a picture from a text", save_flux),
    "flux-kontext": ("FluxKontextPipeline: edits a picture", save_flux_kontext),
    "qwen-image": ("QwenImagePipeline: a picture from a text", save_qwen_image),
    "qwen-image-edit": ("QwenImageEditPipeline: edits a picture (needs torchvision)", save_qwen_image_edit),
    "sd3": ("StableDiffusion3Pipeline: a picture from a text", save_sd3),
    "z-image": ("ZImagePipeline: a picture from a text", save_z_image),
    "ltx": ("LTXPipeline: a video from a text", save_ltx),
    "wan": ("WanPipeline: a video from a text", save_wan),
    "wan-i2v": ("WanImageToVideoPipeline: a video from a picture", save_wan_i2v),
    "llama": ("LlamaForCausalLM", partial(save_language_model, "llama")),
    "mistral": ("MistralForCausalLM", partial(save_language_model, "mistral")),
    "qwen2": ("Qwen2ForCausalLM", partial(save_language_model, "qwen2")),
    "qwen3": ("Qwen3ForCausalLM", partial(save_language_model, "qwen3")),
    "llama-swiftkv": ("LlamaSwiftKVForCausalLM", partial(save_swiftkv_model, "llama")),
    "qwen2-swiftkv": ("Qwen2SwiftKVForCausalLM", partial(save_swiftkv_model, "qwen2")),
    "qwen3-swiftkv": ("Qwen3SwiftKVForCausalLM", partial(save_swiftkv_model, "qwen3")),
}
"""What each family is, and the function that saves its model to a folder."""


def _require_own_folder(folder: Path) -> None:
    """Refuse a folder with files that are not from here: a model of the same file names would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise ConfigError(f"{folder} holds files that this command did not save: name another folder, or an empty one")


def main(arguments: list[str] | None = None) -> int:
    """Save the model that the command line names.

    Args:
        arguments: the words of the command line; None for those of this process.

    Returns:
        The exit code.
    """
    families = "\n".join(f"  {family:17}{description}" for family, (description, _) in MODELS.items())
    parser = argparse.ArgumentParser(
        prog="python -m omni_sp.testing.models",
        description="Save a tiny model with random weights to a folder, to try commands without a download.",
        epilog=f"families:\n{families}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="version", version=families, help="list the families and end")
    parser.add_argument("family", choices=MODELS, metavar="FAMILY", help="one of the families below")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; it is made where it does not exist")
    options = parser.parse_args(arguments)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # which processors it would take with torchvision is of no use here
    try:
        _require_own_folder(options.folder)
        MODELS[options.family][1](options.folder)
        (options.folder / _MARK).touch()
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    print(f"{MODELS[options.family][0]}, saved to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
