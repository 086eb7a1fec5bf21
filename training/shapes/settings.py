"""Sizes of the demo model and the lengths of its training stages."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the weights, besides the machine's rounding.

    Args:
        seed: Every stage derives its random streams from it.
        text_width: Hidden size of the text encoder, and so the width of the prompt embeddings.
        text_steps: Optimizer steps of the text encoder.
        latent_channels: Channels of the autoencoder's latents.
        autoencoder_steps: Optimizer steps of the autoencoder.
        num_layers: Blocks of the transformer.
        num_heads: Attention heads of the transformer.
        head_dim: Channels of a head.
        pool_size: Scenes drawn and encoded once, from which the transformer's batches are taken.
        batch_size: Pictures in one step of the transformer.
        transformer_steps: Optimizer steps of the transformer.
        warmup_steps: Steps over which its learning rate rises.
        half_steps: Steps at the beginning that see half of the picture's tokens only.
        decay_steps: Steps at the end over which its learning rate falls to nothing.
        shift: Timestep shift of training and of the exported scheduler: above 1, more steps at high noise, where the
            shape is decided.
    """

    seed: int = 0
    text_width: int = 64
    text_steps: int = 400
    latent_channels: int = 8
    autoencoder_steps: int = 1800
    num_layers: int = 4
    num_heads: int = 6
    head_dim: int = 32
    pool_size: int = 3072
    batch_size: int = 16
    transformer_steps: int = 3100
    warmup_steps: int = 50
    half_steps: int = 1250
    decay_steps: int = 1100
    shift: float = 2.5
