"""Tiny models with random weights, saved to a folder as users have them: tokenizer and text encoders included.

    python -m testing.models llama tiny-llama       # then, for example: vllm serve tiny-llama

They answer in milliseconds and need no download. What they draw or write has no meaning.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from testing.reference import randomise

WORDS = ["a", "red", "green", "blue", "circle", "star", "on", "in", "the", "snow", "cat", "walks", "make", "it"]
VOCABULARY_SIZE = len(WORDS) + 3
"""The words, ``<pad>``, ``</s>`` and ``<unk>``, which have the token ids 0, 1 and 2."""

_LANGUAGE_MODELS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CONTEXT_LENGTH = 256
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}make"


def tokenizer(max_length: int) -> Any:
    """A tokenizer of transformers with one token a word of ``WORDS``; every text ends in ``</s>``.

    Args:
        max_length: the most tokens of a text.
    """
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

    config = getattr(transformers, f"{_LANGUAGE_MODELS[kind]}Config")(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,  # heads of 32 numbers: the fewest that vLLM's kernels for CPUs know
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=_CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{_LANGUAGE_MODELS[kind]}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
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
        matrices += parameter.nbytes if "_proj.weight" in name else 0
    attentions = [layer.self_attn.attn for layer in model.model.layers]
    kept = sum(2 * attention.num_kv_heads * attention.head_size * 4 for attention in attentions)
    return {"matrices": matrices, "weights": weights, "kept_per_token": kept}


def flux_transformer() -> Any:
    """FLUX's transformer with two double and two single blocks, not yet randomised."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def wan_transformer(**changes: Any) -> Any:
    """Wan's transformer of two blocks, not yet randomised.

    Args:
        **changes: other values of its configuration.
    """
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 3,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 40,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**config, **changes})


def image_vae(latent_channels: int = 4, **changes: Any) -> Any:
    """An AutoencoderKL that shrinks a side to half, so that small pictures have many tokens.

    Args:
        latent_channels: channels of the latent.
        **changes: other values of its configuration.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        **{"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 0.4} | changes,
    )
    return randomise(vae)


def wan_vae(latent_channels: int = 4) -> Any:
    """Wan's VAE, which shrinks sides to an eighth and the number of frames to a quarter.

    Args:
        latent_channels: channels of the latent.
    """
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=latent_channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * latent_channels,
        latents_std=[1.0] * latent_channels,
    )
    return randomise(vae)


def save_flux_kontext(folder: Path) -> None:
    """Save FLUX.1 Kontext, which edits pictures."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
    from transformers import T5Config, T5EncoderModel

    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=_clip_text_encoder(),
        tokenizer=tokenizer(16),
        text_encoder_2=randomise(T5EncoderModel(T5Config(**_t5_config(width=24)))),
        tokenizer_2=tokenizer(512),
        transformer=randomise(flux_transformer()),
    ).save_pretrained(folder)


def save_wan(folder: Path) -> None:
    """Save Wan 2.2 for text to video, with a transformer for the noisy steps and one for the others."""
    from diffusers import WanPipeline

    WanPipeline(**_wan_components(in_channels=4), boundary_ratio=0.9).save_pretrained(folder)


def save_wan_i2v(folder: Path) -> None:
    """Save Wan 2.2 for image to video: its transformers take the first frame and its mask as further channels."""
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(**_wan_components(in_channels=12), boundary_ratio=0.9).save_pretrained(folder)


def _wan_components(in_channels: int) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    return {
        "tokenizer": tokenizer(512),
        "text_encoder": randomise(UMT5EncoderModel(UMT5Config(**_t5_config(width=20)))),
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": randomise(wan_transformer(in_channels=in_channels), seed=1),
        "transformer_2": randomise(wan_transformer(in_channels=in_channels), seed=2),
    }


def _t5_config(width: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
    }


def _clip_text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
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


MODELS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "llama": ("LlamaForCausalLM", partial(save_language_model, "llama")),
    "mistral": ("MistralForCausalLM", partial(save_language_model, "mistral")),
    "qwen2": ("Qwen2ForCausalLM", partial(save_language_model, "qwen2")),
    "qwen3": ("Qwen3ForCausalLM", partial(save_language_model, "qwen3")),
    "flux-kontext": ("FluxKontextPipeline: edits a picture", save_flux_kontext),
    "wan": ("WanPipeline: a video from a text", save_wan),
    "wan-i2v": ("WanImageToVideoPipeline: a video from a picture", save_wan_i2v),
}
"""What each kind is, and the function that saves it to a folder."""


def main(arguments: list[str] | None = None) -> None:
    """Save the model that the command line names.

    Args:
        arguments: the words of the command line; None for those of this process.
    """
    kinds = "\n".join(f"  {kind:14}{description}" for kind, (description, _) in MODELS.items())
    parser = argparse.ArgumentParser(
        prog="python -m testing.models",
        description="Save a tiny model with random weights to a folder, to try commands without a download.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=MODELS, metavar="KIND", help="one of the kinds below")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; it is made where it does not exist")
    options = parser.parse_args(arguments)
    MODELS[options.kind][1](options.folder)


if __name__ == "__main__":
    main()
