"""Tiny components that several families of pipelines share."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from omni_sp.testing.components import clip_text_encoder, qwen_image_vae
from omni_sp.testing.reference import randomise
from tests.sharding.zoo.entry import draw


def transformer(entry_id: str, seed: int = 0) -> Any:
    """The tiny transformer that tests/sharding/zoo has under this id."""
    from tests.sharding.zoo.all import ENTRIES

    return randomise(ENTRIES[entry_id].build(), seed)


def letter_tokenizer(max_length: int) -> Any:
    """A token for each letter, with marks of beginning and end; pads to ``max_length`` where asked for that."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<bos>", "<unk>", "<eos>"]
    vocabulary = {token: number for number, token in enumerate(marks + [chr(code) for code in range(32, 127)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
    )


def clip_with_projection(hidden_size: int, projection_dim: int, seed: int = 0) -> Any:
    """For ``letter_tokenizer``, with a pooled embedding of ``projection_dim``."""
    return clip_text_encoder(letter_tokenizer(32), hidden_size, projection_dim, seed=seed)


def picture(seed: int, batch: int, height: int, width: int) -> torch.Tensor:
    """Noise as pixels from 0 to 1."""
    return draw(seed, batch, 3, height, width).sigmoid()


def pil_picture(seed: int, height: int, width: int) -> Any:
    """The same as a PIL picture, for pipelines that take no tensor."""
    from PIL import Image

    pixels = (picture(seed, 1, height, width)[0].permute(1, 2, 0) * 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


class PictureProcessor:
    """Stands in for the processors of CLIP and SigLIP, which need torchvision: pictures become squares of one size."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, images: Any, **options: Any) -> Any:
        from diffusers.image_processor import VaeImageProcessor
        from transformers import BatchFeature

        shrink = VaeImageProcessor(vae_scale_factor=1)
        squares = [
            shrink.preprocess(image, height=self.side, width=self.side)
            for image in (images if isinstance(images, list) else [images])
        ]
        return BatchFeature({"pixel_values": torch.cat(squares)})

    preprocess = __call__


def resized(model: Any, kind: Any = None, seed: int = 0, **config: Any) -> Any:
    """A model with the configuration of this one (what ``kind``, another class, takes of it), changed in ``config``."""
    kind = kind or type(model)
    known = inspect.signature(kind.__init__).parameters
    return randomise(kind(**{**{name: size for name, size in model.config.items() if name in known}, **config}), seed)


def clear_qwen_vae() -> Any:
    """The same as ``qwen_image_vae``, but a change of the latent changes the picture four times as much."""
    vae = qwen_image_vae()
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(8.0)
    return vae
