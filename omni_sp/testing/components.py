"""Tiny parts of pipelines: tokenizers, text encoders, transformers and VAEs of a few thousand weights each."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.reference import randomise

WORDS = ["a", "red", "green", "blue", "circle", "star", "on", "in", "the", "snow", "cat", "walks", "make", "it"]
VOCABULARY_SIZE = len(WORDS) + 3
"""The words, ``<pad>``, ``</s>`` and ``<unk>``, which have the token ids 0, 1 and 2."""


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


def t5_text_encoder(tokenizer: Any, channels: int, *, multilingual: bool = False) -> Any:
    """T5's encoder of one layer.

    Args:
        tokenizer: the one whose tokens it reads.
        channels: of an embedding; a multiple of 4.
        multilingual: UMT5's, which is built like it.
    """
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config_class, model_class = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=channels,
        d_kv=channels // 2,
        d_ff=2 * channels,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return randomise(model_class(config))


def clip_text_encoder(tokenizer: Any, channels: int, projection: int | None = None, *, seed: int = 0) -> Any:
    """CLIP's text encoder of two layers.

    Args:
        tokenizer: the one whose tokens it reads.
        channels: of an embedding; an even number.
        projection: channels of the pooled embedding, where it has a projection of its own.
        seed: of its weights.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=channels,
        intermediate_size=2 * channels,
        projection_dim=projection or channels,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return randomise((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), seed)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 24, "timestep_guidance_channels": 20,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "QwenImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 12,
        "num_attention_heads": 3, "joint_attention_dim": 20, "axes_dims_rope": (4, 4, 4),
    },
    "SD3Transformer2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 3, "joint_attention_dim": 20, "caption_projection_dim": 24, "pooled_projection_dim": 12,
        "out_channels": 4, "pos_embed_max_size": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 36, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
        "cap_feat_dim": 20, "axes_dims": [4, 4, 4], "axes_lens": [256, 32, 32],
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 20, "caption_projection_dim": 24,
        "out_channels": 4, "pos_embed_max_size": 256,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 36, "num_layers": 2,
        "num_refiner_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4), "axes_lens": (30, 16, 16), "cap_feat_dim": 20,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 3, "cross_attention_head_dim": 8, "cross_attention_dim": 24,
        "caption_channels": 20, "sample_size": 16,
    },
    "WanTransformer3DModel": {
        "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4,
        "out_channels": 4, "text_dim": 20, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 32,
    },
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 20,
        "pooled_projection_dim": 12, "rope_axes_dim": (4, 6, 6),
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 3, "attention_head_dim": 16,
        "cross_attention_dim": 48, "num_layers": 2, "caption_channels": 20,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
        "text_embed_dim": 20, "num_layers": 2, "sample_width": 10, "sample_height": 6, "sample_frames": 9,
        "patch_size": 2, "max_text_seq_length": 13,
    },
    "MochiTransformer3DModel": {
        "patch_size": 2, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3,
        "pooled_projection_dim": 18, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 12,
        "max_sequence_length": 13,
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 12, "time_dim": 32, "out_visual_dim": 4,
        "patch_size": (1, 2, 2), "model_dim": 48, "ff_dim": 64, "num_text_blocks": 2, "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6), "visual_cond": True,
    },
}  # fmt: skip
"""Tiny configurations, by class of diffusers."""


def transformer(name: str, **changes: Any) -> Any:
    """A tiny transformer, not yet randomised.

    Args:
        name: its class, one of ``TRANSFORMERS``.
        **changes: other values of its configuration.
    """
    import diffusers

    return getattr(diffusers, name)(**{**TRANSFORMERS[name], **changes})


def image_vae(latent_channels: int = 4, *, num_levels: int = 2, **changes: Any) -> Any:
    """An AutoencoderKL that by default shrinks a side to half, so that small pictures have many tokens.

    Args:
        latent_channels: channels of the latent.
        num_levels: one more than how often a side is halved.
        **changes: other values of its configuration.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=(8,) * num_levels,
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


def qwen_image_vae() -> Any:
    """Qwen-Image's VAE, which shrinks a side to an eighth."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return randomise(vae)


LTX_VAE: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8,),
    "decoder_block_out_channels": (8,),
    "layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "spatio_temporal_scaling": (True,),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "upsample_residual": (False,),
    "upsample_factor": (1,),
    "patch_size": 16,
}
"""Values of a configuration that the VAEs of LTX and LTX-2 share: sides to a 32nd, frames to a half."""


def ltx_vae() -> Any:
    """LTX-Video's VAE, which shrinks sides to a 32nd and the number of frames to a half."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        **LTX_VAE, down_block_types=("LTXVideoDownBlock3D",), downsample_type=("conv",), timestep_conditioning=True
    )
    return randomise(vae)
