"""Uploaded pictures, decoded with care, and finished ones as files."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Literal

from PIL import Image, ImageChops, ImageOps

from omni_sp.server.errors import ApiError

PictureFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_READABLE = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:(?P<type>[\w./+-]*)(?P<base64>;base64)?,", re.ASCII)
_BEST_QUALITY = 95
"""Of JPEG where nobody asks for less; above it files grow and pictures do not change."""


def decode_picture(data: bytes, *, param: str, max_pixels: int) -> Image.Image:
    """An uploaded PNG, JPEG or WebP file as a picture, upright, RGB or RGBA where it has transparency.

    How large it is says its header, so that nothing larger than ``max_pixels`` is ever decoded.

    Raises:
        ApiError: 400, naming ``param``: no picture, another format, too large, animated, or cut off.
    """
    if not data:
        raise _refused(param, "the file is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=_READABLE)
        width, height = picture.size
        frames = getattr(picture, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(param, f"it has more than {max_pixels} pixels, which is the most here") from error
    except Exception as error:  # whatever a parser makes of bytes that somebody sent
        raise _refused(param, "it is no PNG, JPEG or WebP file, or a damaged one") from error
    if width * height > max_pixels:
        raise _refused(
            param, f"{width} x {height} = {width * height} pixels are more than {max_pixels}, which is the most here"
        )
    if frames > 1:
        raise _refused(param, f"it is animated ({frames} pictures): give a single one")
    try:
        upright = ImageOps.exif_transpose(picture)
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except Exception as error:
        raise _refused(param, f"the {picture.format} file is damaged or cut off") from error


def decode_data_url(url: object, *, param: str, max_pixels: int) -> Image.Image:
    """The picture of a ``data:image/…;base64,…`` URL; otherwise as decode_picture()."""
    head = _DATA_URL.match(url) if isinstance(url, str) else None
    if not isinstance(url, str) or head is None or not head["base64"]:
        raise _refused(param, "give a URL that begins with data:image/png;base64,")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(param, f"the data URL holds no base64: {error}") from error
    return decode_picture(data, param=param, max_pixels=max_pixels)


def edit_mask(mask: Image.Image, like: Image.Image) -> Image.Image:
    """OpenAI's mask (transparent where to draw) as diffusers' (white where to draw, black where to keep).

    Raises:
        ApiError: 400: it has no transparency, or another size than the picture.
    """
    if mask.mode != "RGBA":
        raise _refused("mask", "it has no transparency: where the picture is to be drawn anew, it must be transparent")
    if mask.size != like.size:
        raise _refused("mask", f"it is {mask.width} x {mask.height}, the picture {like.width} x {like.height} pixels")
    return ImageChops.invert(mask.getchannel("A"))


def encode_picture(picture: Image.Image, kind: PictureFormat, quality: int | None = None) -> bytes:
    """A picture as a file.

    Args:
        quality: of JPEG and WebP, 0 … 100; None for the best that is worth its bytes. Where JPEG is asked for,
            transparent places become white, which is all that JPEG can hold.
    """
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    elif kind == "webp":
        picture.save(file, "WEBP", quality=_BEST_QUALITY if quality is None else quality)
    else:
        if picture.mode == "RGBA":
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        wanted = _BEST_QUALITY if quality is None else max(quality, 1)
        picture.convert("RGB").save(file, "JPEG", quality=wanted, subsampling=0 if wanted >= _BEST_QUALITY else -1)
    return file.getvalue()


def as_base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def _refused(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", param=param, code="invalid_image")
