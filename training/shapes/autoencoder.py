"""The autoencoder stage: an `AutoencoderKLQwenImage` for single pictures, 8x smaller on either side.

Letters in tensor names: B batch, C channels, H height, W width.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageRMS_norm
from torch import Tensor, nn

from training.shapes.settings import Settings
from training.shapes.world import PICTURE_SIZE, Scene, random_scene

__all__ = ["build_autoencoder", "decode_pictures", "encode_pictures", "load_autoencoder", "train_autoencoder"]

_NUM_PICTURES = 1536
_CROP_SIZE = 64
_MAX_LEARNING_RATE = 3e-3
_KL_WEIGHT = 1e-4
# The last part of the training sees whole pictures, as the attention in the decoder's middle will in use.
_WHOLE_PICTURES_FROM = 0.85


def build_autoencoder(settings: Settings) -> AutoencoderKLQwenImage:
    """Make the untrained autoencoder; only the last temporal tap of its convolutions is non-zero."""
    latent_channels = settings.latent_channels
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=latent_channels,
        dim_mult=[1, 2, 4, 8],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * latent_channels,
        latents_std=[1.0] * latent_channels,
    )
    with torch.no_grad():
        for module in autoencoder.modules():
            if isinstance(module, QwenImageCausalConv3d):
                # The default initialisation spreads the variance over all taps, and one frame sees only the last one.
                module.weight.mul_(math.sqrt(module.kernel_size[0]))
                module.weight[:, :, :-1] = 0
    return autoencoder


def train_autoencoder(settings: Settings, device: torch.device) -> AutoencoderKLQwenImage:
    """Train an autoencoder on ideal drawings and measure the mean and deviation of its latents.

    Args:
        settings: The sizes and the number of steps.
        device: Where to train.

    Returns:
        The trained autoencoder on `device`, its config's `latents_mean` and `latents_std` set.
    """
    rng = np.random.default_rng((settings.seed, 1))
    torch.manual_seed(settings.seed)
    scenes = [random_scene(rng) for _ in range(_NUM_PICTURES)]
    pictures = torch.from_numpy(np.stack([np.asarray(scene.draw()) for scene in scenes])).permute(0, 3, 1, 2)
    autoencoder = build_autoencoder(settings).to(device)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=_MAX_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _MAX_LEARNING_RATE, total_steps=settings.autoencoder_steps, pct_start=0.05
    )
    start = time.monotonic()
    with _single_frame(autoencoder):
        for step in range(settings.autoencoder_steps):
            whole = step >= _WHOLE_PICTURES_FROM * settings.autoencoder_steps
            pictures_BCHW = _batch(pictures, scenes, rng, whole=whole).to(device)
            loss, mean_squared_error = _loss(autoencoder, pictures_BCHW)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == settings.autoencoder_steps - 1:
                # 4 is the square of the pictures' range, which is -1 to 1.
                psnr = 10 * math.log10(4 / mean_squared_error)
                seconds = time.monotonic() - start
                print(f"autoencoder step {step} loss {loss.item():.4f} PSNR {psnr:.1f} dB {seconds:.0f} s", flush=True)
    autoencoder.eval()
    with torch.no_grad(), _single_frame(autoencoder):
        latents = torch.cat([_encode(autoencoder, _normalize(part).to(device)) for part in pictures[:128].split(16)])
    autoencoder.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3)).tolist(), latents_std=latents.std(dim=(0, 2, 3)).tolist()
    )
    return autoencoder


def load_autoencoder(folder: Path, device: torch.device) -> AutoencoderKLQwenImage:
    """Load a trained autoencoder in float32."""
    autoencoder: AutoencoderKLQwenImage = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)
    return autoencoder.eval().to(device)


@torch.no_grad()
def encode_pictures(autoencoder: AutoencoderKLQwenImage, pictures_BCHW: Tensor) -> Tensor:
    """Encode pictures to the latents that the transformer sees.

    Args:
        autoencoder: A trained autoencoder.
        pictures_BCHW: uint8, on any device.

    Returns:
        (B, latent_channels, H / 8, W / 8), of about zero mean and unit deviation.
    """
    mean, std = _statistics(autoencoder)
    with _single_frame(autoencoder):
        return (_encode(autoencoder, _normalize(pictures_BCHW).to(autoencoder.device)) - mean) / std


@torch.no_grad()
def decode_pictures(autoencoder: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
    """Invert `encode_pictures`: latents to uint8 pictures (B, 3, H, W)."""
    mean, std = _statistics(autoencoder)
    with _single_frame(autoencoder):
        pictures = _decode(autoencoder, latents_BCHW * std + mean)
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _statistics(autoencoder: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation of the latents, each of shape (latent_channels, 1, 1)."""
    config = autoencoder.config
    mean, std = (
        torch.tensor(values, device=autoencoder.device) for values in (config.latents_mean, config.latents_std)
    )
    return mean[:, None, None], std[:, None, None]


def _batch(pictures: Tensor, scenes: list[Scene], rng: np.random.Generator, *, whole: bool) -> Tensor:
    """Take whole pictures, or crops about a point of the shape's edge, and mirror them at random; range -1 to 1."""
    num_pictures, size = (2, PICTURE_SIZE) if whole else (16, _CROP_SIZE)
    crops = []
    for index in rng.integers(len(scenes), size=num_pictures):
        corner = rng.choice(scenes[index].outline()) * PICTURE_SIZE
        centre = corner + rng.uniform(-size / 2, size / 2, size=2)
        left, top = np.clip(centre - size / 2, 0, PICTURE_SIZE - size).astype(int)
        crop = pictures[index, :, top : top + size, left : left + size]
        crop = crop.transpose(1, 2) if rng.random() < 0.5 else crop
        mirrored = [dim for dim in (1, 2) if rng.random() < 0.5]
        crops.append(crop.flip(mirrored))
    return _normalize(torch.stack(crops))


def _normalize(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into floats from -1 to 1."""
    return pictures.float() / 127.5 - 1


def _loss(autoencoder: AutoencoderKLQwenImage, pictures_BCHW: Tensor) -> tuple[Tensor, float]:
    """Return the training loss and, for the report, the mean squared error alone."""
    mean_BCHW, log_variance_BCHW = _posterior(autoencoder, pictures_BCHW)
    latents_BCHW = mean_BCHW + torch.exp(0.5 * log_variance_BCHW) * torch.randn_like(mean_BCHW)
    error = _decode(autoencoder, latents_BCHW) - pictures_BCHW
    kl = 0.5 * (mean_BCHW.square() + log_variance_BCHW.exp() - 1 - log_variance_BCHW).mean()
    squared = error.square().mean()
    # The absolute error keeps plain areas plain, the squared error keeps edges in place.
    return 0.2 * error.abs().mean() + squared + _KL_WEIGHT * kl, squared.item()


def _posterior(autoencoder: AutoencoderKLQwenImage, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the log variance of the latents of pictures from -1 to 1."""
    moments = autoencoder.quant_conv(autoencoder.encoder(pictures_BCHW[:, :, None]))[:, :, 0]
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def _encode(autoencoder: AutoencoderKLQwenImage, pictures_BCHW: Tensor) -> Tensor:
    return _posterior(autoencoder, pictures_BCHW)[0]


def _decode(autoencoder: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
    decoded: Tensor = autoencoder.decoder(autoencoder.post_quant_conv(latents_BCHW[:, :, None]))[:, :, 0]
    return decoded


@contextmanager
def _single_frame(autoencoder: AutoencoderKLQwenImage) -> Iterator[None]:
    """Let the causal 3D convolutions compute on one frame as the 2D convolutions that they then equal.

    The frames before the first are zeros, so only the last temporal tap of a kernel counts.  Convolving with that tap
    alone is several times faster, and gives the other taps no gradient.  The norms pass over the picture less often.
    """
    replacements: dict[type, Callable[..., Tensor]] = {
        QwenImageCausalConv3d: _last_tap,
        QwenImageRMS_norm: _normalize_channels,
    }
    modules = [module for module in autoencoder.modules() if type(module) in replacements]
    for module in modules:
        module.forward = partial(replacements[type(module)], module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _last_tap(convolution: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Apply a causal 3D convolution to one frame, (B, C, 1, H, W)."""
    if x.shape[2] != 1 or cache_x is not None:
        raise ValueError(f"the last tap alone is right for 1 frame without a cache, not for {x.shape[2]} frames")
    _, _, _, padding_H, _, _ = convolution._padding
    return F.conv2d(x[:, :, 0], convolution.weight[:, :, -1], convolution.bias, padding=padding_H)[:, :, None]


def _normalize_channels(norm: QwenImageRMS_norm, x: Tensor) -> Tensor:
    """Apply a norm over the channels, dim 1, scaling the small tensor of lengths instead of the large `x`."""
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    normalized: Tensor = x * (norm.scale / lengths) * norm.gamma
    return normalized
