"""Tiny pipelines saved to a folder, as a user has them: tokenizers and text encoders included, all from code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.pipelines.zoo.parts import image_vae, wan_vae
from tests.sharding.models import flux, randomise

WORDS = ["a", "red", "green", "blue", "circle", "star", "on", "in", "the", "snow", "cat", "walks", "make", "it"]


def tokenizer(max_length: int) -> Any:
    """One token for a word; unknown words are <unk>, and every text ends in </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _t5(umt5: bool, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config: dict[str, Any] = {
        "vocab_size": len(WORDS) + 3,
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
    }
    return randomise(UMT5EncoderModel(UMT5Config(**config)) if umt5 else T5EncoderModel(T5Config(**config)))


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return randomise(CLIPTextModel(config))


def save_kontext(folder: Path) -> None:
    """FLUX.1 Kontext, which edits pictures. Its VAE shrinks a side to half, so that small pictures have many tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=_clip(),
        tokenizer=tokenizer(16),
        text_encoder_2=_t5(umt5=False, width=24),
        tokenizer_2=tokenizer(512),
        transformer=randomise(flux()),
    ).save_pretrained(folder)


def save_wan(folder: Path) -> None:
    """Wan 2.2, text to video, with a transformer for the noisy steps and one for the others."""
    from diffusers import WanPipeline

    WanPipeline(**_wan_parts(in_channels=4), boundary_ratio=0.9).save_pretrained(folder)


def save_wan_i2v(folder: Path) -> None:
    """Wan 2.2, image to video: the first frame and where it is come as further channels."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(**_wan_parts(in_channels=12), boundary_ratio=0.9).save_pretrained(folder)


def _wan_parts(in_channels: int) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 24,
        "in_channels": in_channels,
        "out_channels": 4,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return {
        "tokenizer": tokenizer(512),
        "text_encoder": _t5(umt5=True, width=20),
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": randomise(WanTransformer3DModel(**config), seed=1),
        "transformer_2": randomise(WanTransformer3DModel(**config), seed=2),
    }
