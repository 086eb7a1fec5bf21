"""Tiny autoencoders of diffusers, one for each class and for each way of building it, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from omni_sp.testing.reference import randomise

Shape = tuple[int, ...]
_FOUR = [0.0] * 4, [1.0] * 4
_RESIDUAL = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
_STATISTICS = {"latents_mean": _FOUR[0], "latents_std": _FOUR[1]}


@dataclass(frozen=True)
class Vae:
    """One autoencoder.

    Attributes:
        class_name: its class.
        config: of a tiny one.
        latents: a shape to decode, with a number of rows that two and three ranks share unevenly.
        picture: a shape to encode; None where it does not encode.
        options: of ``decode``.
        gathers: operations of decode and encode that need all rows; without them, nothing is gathered.
    """

    class_name: str
    config: dict[str, Any]
    latents: Shape | None
    picture: Shape | None
    options: dict[str, Any] = field(default_factory=dict)
    gathers: frozenset[str] = frozenset()
    name: str = ""

    @property
    def id(self) -> str:
        return f"{self.class_name} {self.name}".strip()

    @property
    def is_sound(self) -> bool:
        return self.latents is not None and len(self.latents) == 3

    def build(self) -> Any:
        import diffusers

        vae = randomise(getattr(diffusers, self.class_name)(**self.config)).eval()
        if getattr(vae, "use_tiling", False):  # one class has it on from the start
            vae.disable_tiling()
        return vae

    def calls(self) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
        """Method -> its argument and options."""
        found: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}
        if self.latents is not None:
            found["decode"] = draw(1, self.latents), self.options
        if self.picture is not None:
            found["encode"] = draw(2, self.picture), {}
        return found


def draw(seed: int, shape: Shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ATTENDS = frozenset({"attention"})
WRITES_TO_ITS_OWN_BUFFER = frozenset({"aten.copy_.default"})
NOT_HERE = {"AutoencoderKLAllegro": "diffusers decodes and encodes it by tiles alone, so that it runs whole"}
"""Classes called like these that are not among them -> why."""


def dc_ae(down: str, up: str, levels: int) -> dict[str, Any]:
    """AutoencoderDC's configuration."""
    blocks = ["ResBlock"] * (levels - 1) + ["EfficientViTBlock"]
    config: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "downsample_block_type": down,
        "upsample_block_type": up,
        "decoder_act_fns": ("silu",) * levels,
    }
    for part in ("encoder", "decoder"):
        config |= {
            f"{part}_block_types": tuple(blocks),
            f"{part}_block_out_channels": (8,) * (levels - 1) + (16,),
            f"{part}_layers_per_block": (1,) * levels,
            f"{part}_qkv_multiscales": ((),) * (levels - 1) + ((5,),),
        }
    return config


def kl(*channels: int, **more: Any) -> dict[str, Any]:
    """What most configurations have."""
    return {"block_out_channels": channels, "latent_channels": 4, **more}


VAES = [
    Vae(
        "AutoencoderKL",
        kl(
            8,
            8,
            16,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        (1, 4, 7, 6),
        (1, 3, 28, 24),
        gathers=ATTENDS,
    ),
    Vae(
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 8),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (8, 8),
            "norm_num_groups": 4,
        },
        (1, 4, 7, 6),
        (1, 3, 14, 12),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderTiny",
        {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
        (1, 4, 7, 6),
        (1, 3, 56, 48),
    ),
    Vae("AutoencoderKLFlux2", kl(8, 8, 16, 16, norm_num_groups=4), (1, 4, 7, 6), (1, 3, 56, 48), gathers=ATTENDS),
    Vae(
        "AutoencoderKLQwenImage",
        {"base_dim": 8, "z_dim": 4, **_RESIDUAL, **_STATISTICS},
        (1, 4, 1, 7, 6),
        (1, 3, 1, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLQwenImage21",
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2, 2],
            "num_res_blocks": 1,
            **_STATISTICS,
        },
        (1, 4, 1, 7, 6),
        (1, 4, 1, 112, 96),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLWan",
        {"base_dim": 8, "z_dim": 4, **_RESIDUAL, **_STATISTICS},
        (1, 4, 3, 7, 6),
        (1, 3, 9, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLWan",
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "z_dim": 4,
            **_RESIDUAL,
            **_STATISTICS,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        (1, 4, 3, 7, 6),
        (1, 3, 9, 112, 96),
        gathers=ATTENDS,
        name="2.2",
    ),
    Vae(
        "AutoencoderKLHunyuanVideo",
        kl(8, 8, 8, 8, layers_per_block=1, norm_num_groups=4),
        (1, 4, 2, 7, 6),
        (1, 3, 5, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLHunyuanVideo15",
        kl(8, 16, 16, 16, 16, layers_per_block=1),
        (1, 4, 2, 7, 6),
        (1, 3, 5, 112, 96),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (32, 32, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 32,
            "scaling_factor": 1.0,
        },
        (1, 8, 7, 6),
        (1, 3, 28, 24),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLHunyuanImageRefiner",
        kl(8, 16, 16, 16, 16, layers_per_block=1),
        (1, 4, 2, 7, 6),
        (1, 3, 5, 112, 96),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLLTXVideo",
        kl(
            8,
            8,
            8,
            8,
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            patch_size=2,
        )
        | {"latent_channels": 8},
        (1, 8, 2, 7, 6),
        (1, 3, 9, 112, 96),
    ),
    Vae(
        "AutoencoderKLLTX2Video",
        kl(
            8,
            8,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
            patch_size=2,
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            downsample_type=("spatial", "spatiotemporal"),
            decoder_inject_noise=(False,) * 3,
            upsample_residual=(False,) * 2,
            upsample_factor=(1, 1),
        )
        | {"latent_channels": 8},
        (1, 8, 2, 7, 6),
        None,
    ),
    Vae(
        "AutoencoderKLCogVideoX",
        kl(8, 8, 8, 8, layers_per_block=1, norm_num_groups=4),
        (1, 4, 3, 7, 6),
        (1, 3, 9, 56, 48),
    ),
    Vae("AutoencoderDC", dc_ae("stride_conv", "interpolate", 2), (1, 4, 7, 6), (1, 3, 14, 12), name="interpolating"),
    Vae("AutoencoderDC", dc_ae("pixel_unshuffle", "pixel_shuffle", 3), (1, 4, 7, 6), (1, 3, 28, 24), name="shuffling"),
    Vae(
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1,) * 5,
            **_STATISTICS,
        },
        (1, 4, 2, 7, 6),
        (1, 3, 6, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLMagvit", kl(8, 8, 8, 8, layers_per_block=1, norm_num_groups=2), (1, 4, 2, 7, 6), (1, 3, 5, 56, 48)
    ),
    Vae(
        "AutoencoderKLCosmos",
        {
            "encoder_block_out_channels": (8,) * 4,
            "decode_block_out_channels": (8,) * 4,
            "attention_resolutions": (32,),
            "num_layers": 1,
            "latent_channels": 4,
        },
        (1, 4, 2, 7, 6),
        (1, 3, 9, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLTemporalDecoder",
        kl(32, 32, down_block_types=("DownEncoderBlock2D",) * 2),
        (4, 4, 7, 6),
        (1, 3, 14, 12),
        options={"num_frames": 4},
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 2)},
        (1, 4, 7, 6),
        (1, 3, 28, 24),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLKVAEVideo",
        {"ch": 32, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "z_channels": 4},
        (1, 4, 3, 7, 6),
        (1, 3, 9, 28, 24),
        gathers=WRITES_TO_ITS_OWN_BUFFER,
    ),
    Vae(
        "Kandinsky6SRVAE",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (16, 32, 32),
            "decoder_block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
        },
        (1, 4, 3, 7, 6),
        (1, 3, 9, 28, 24),
        gathers=WRITES_TO_ITS_OWN_BUFFER,
    ),
    Vae(
        "AutoencoderVidTok",
        {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        (1, 4, 2, 7, 6),
        (1, 3, 5, 56, 48),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 3, 4],
            "channel_multiples": [1, 2, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 2,
        },
        (1, 4, 13),
        (1, 2, 13 * 24),
    ),
    Vae(
        "AutoencoderKLKVAEAudio",
        {
            "encoder_dim": 8,
            "encoder_rates": [2, 3],
            "latent_dim": 32,
            "codebook_dim": 4,
            "decoder_dim": 16,
            "decoder_rates": [3, 2],
            "attn_num_heads": 2,
        },
        (1, 4, 13),
        (1, 1, 13 * 6),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLLTX2Audio",
        {"base_channels": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 8},
        (1, 4, 7, 4),
        (1, 2, 25, 8),
    ),
    Vae(
        "AutoencoderKLMiniMaxH3",
        {
            "latent_channels": 4,
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_downsample_factors": (2, 2, 1),
            "temporal_downsample_factors": (2, 2, 1),
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        (1, 4, 7, 7, 6),
        (1, 3, 22, 28, 24),
        gathers=ATTENDS,
    ),
    Vae(
        "AutoencoderKLMiniMaxH3Audio",
        {
            "encoder_dim": 8,
            "encoder_rates": (2, 3),
            "latent_dim": 32,
            "latent_channels": 4,
            "num_attention_heads": 2,
            "decoder_dim": 16,
            "decoder_rates": (3, 2),
            "decoder_kernel_sizes": (7, 4),
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3),),
        },
        (1, 4, 13),
        (1, 1, 13 * 6),
        gathers=ATTENDS | {"aten._adaptive_avg_pool2d.default"},
    ),
    Vae(
        "VQModel",
        {"block_out_channels": (32,), "latent_channels": 3},
        (1, 3, 7, 6),
        (1, 3, 7, 6),
        gathers=ATTENDS | {"aten._euclidean_dist.default", "aten.mean.default"},
    ),
]
BY_ID: dict[str, Vae] = {vae.id: vae for vae in VAES}
