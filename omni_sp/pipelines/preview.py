"""Small images of how far a denoising is, decoded from the latent that the scheduler has just made."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

_MAX_SIDE = 32
"""Latents along the longer side of what is decoded: a fraction of a second on a CPU, nothing on a GPU."""


class Previews:
    """Keeps the latest latent of a pipeline's scheduler.

    The height and width of the image, in pixels, are for latents that come as sequences of patches.
    """

    def __init__(self, pipe: Any, height: int | None, width: int | None) -> None:
        self._pipe, self._height, self._width = pipe, height, width
        self._latent: torch.Tensor | None = None

    def keep(self, latent: torch.Tensor) -> None:
        """Take the latent that a step has made."""
        self._latent = latent

    def images(self, count: int = 1) -> tuple[Image.Image, ...]:
        """Return the first ``count`` images (or first frames of videos) as they are now; none of an unknown latent."""
        try:
            with torch.no_grad():
                latent = self._small_latent(count)
                return () if latent is None else _decode(self._pipe.vae, latent)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return ()  # a result without previews is better than no result

    def _small_latent(self, count: int) -> torch.Tensor | None:
        """The latent, shrunk, of shape (count, channels, [1,] height, width)."""
        if self._latent is None:
            return None
        latent = self._latent[:count]
        if latent.ndim == 3:
            latent = self._pipe._unpack_latents(latent, self._height, self._width, self._pipe.vae_scale_factor)
        latent = latent[:, :, :1] if latent.ndim == 5 else latent
        shrink = max(latent.shape[-2:]) / _MAX_SIDE
        if shrink > 1:
            size = [max(1, round(side / shrink)) for side in latent.shape[-2:]]
            small = torch.nn.functional.interpolate(latent.flatten(0, -4).float(), size=size, mode="area")
            latent = small.to(latent.dtype).view(*latent.shape[:-2], *size)
        return latent


def _decode(vae: Any, latent: torch.Tensor) -> tuple[Image.Image, ...]:
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        shape = (1, -1) + (1,) * (latent.ndim - 2)
        mean, std = (
            torch.tensor(numbers, device=latent.device, dtype=latent.dtype).view(shape)
            for numbers in (config.latents_mean, config.latents_std)
        )
        latent = latent * std + mean
    else:
        latent = latent / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    pixels = vae.decode(latent.to(vae.dtype), return_dict=False)[0]
    frames = pixels[:, :3, 0] if pixels.ndim == 5 else pixels[:, :3]
    levels = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return tuple(Image.fromarray(level) for level in levels.permute(0, 2, 3, 1).cpu().numpy())
