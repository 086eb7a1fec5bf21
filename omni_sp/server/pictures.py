"""Uploaded pictures, decoded with care, and finished ones as files."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Literal

from PIL import Image, ImageChops

from omni_sp.errors import InvalidInputError
from omni_sp.pipelines.images import WEB_FORMATS, decode_image
from omni_sp.server.errors import refusal
from omni_sp.server.fetch import fetch
from omni_sp.server.settings import ServerSettings

PictureFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_DATA_URL = re.compile(r"data:(?P<type>[\w./+-]*)(?P<base64>;base64)?,", re.ASCII)
_BEST_QUALITY = 95
"""The quality of a JPEG where nobody asks for less; above it files grow and pictures do not change."""


def decode_picture(data: bytes, *, param: str, max_pixels: int) -> Image.Image:
    """Decode an uploaded PNG, JPEG or WebP file: upright, RGB, or RGBA where it has transparency.

    Raises:
        ApiError: 400, naming ``param``: no picture, another format, too large, animated, or cut off.
    """
    try:
        return decode_image(data, formats=WEB_FORMATS, max_pixels=max_pixels, allow_animated=False)
    except InvalidInputError as error:
        raise refusal(param, str(error), code="invalid_image") from error


def picture_at(url: object, settings: ServerSettings, *, param: str) -> Image.Image:
    """Decode the picture at a data: URL, or an http(s) one where the operator allows it. Call this in a thread.

    Raises:
        ApiError: 400, naming ``param``: no such URL, nothing to fetch there, or a picture that cannot be decoded.
    """
    text = url if isinstance(url, str) else ""
    if text[:5].lower() == "data:":
        data = _decode_data_url(text, param=param)
    elif settings.allow_url_images and text.lower().startswith(("http://", "https://")):
        data = fetch(text, max_bytes=settings.max_body_bytes, param=param)
    else:
        how = "; this server fetches no URLs" if text.lower().startswith("http") else ""
        reason = f"a picture is given as {str(url)[:40]!r}: send it as data:image/png;base64,…{how}"
        raise refusal(param, reason, code="invalid_image_url")
    return decode_picture(data, param=param, max_pixels=settings.max_pixels)


def _decode_data_url(url: str, *, param: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None or not head["base64"]:
        raise refusal(param, "give a URL that begins with data:image/png;base64,", code="invalid_image")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal(param, f"the data URL holds no base64: {error}", code="invalid_image") from error


def edit_mask(mask: Image.Image, like: Image.Image) -> Image.Image:
    """Turn OpenAI's mask (transparent where to draw) into diffusers' (white where to draw, black where to keep).

    Raises:
        ApiError: 400: it has no transparency, or another size than the picture.
    """
    reason = None
    if mask.mode != "RGBA":
        reason = "it has no transparency: where the picture is to be drawn anew, it must be transparent"
    elif mask.size != like.size:
        reason = f"it is {mask.width} x {mask.height}, the picture {like.width} x {like.height} pixels"
    if reason is not None:
        raise refusal("mask", reason, code="invalid_image")
    return ImageChops.invert(mask.getchannel("A"))


def encode_picture(picture: Image.Image, kind: PictureFormat, quality: int | None = None) -> bytes:
    """Encode a picture as a file. In a JPEG, transparent pixels become white: it has no transparency.

    ``quality`` is that of JPEG and WebP, 0 … 100; None for the best that is worth its bytes.
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
