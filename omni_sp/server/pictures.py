"""Uploaded pictures, decoded with care, and finished ones as files."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image

from omni_sp.errors import InvalidInputError
from omni_sp.pipelines.images import WEB_FORMATS, decode_image
from omni_sp.pipelines.metadata import save_options
from omni_sp.server.errors import refusal
from omni_sp.server.fetch import fetch
from omni_sp.server.settings import ServerSettings

PictureFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_DATA_URL = re.compile(r"data:(?P<type>[\w./+-]*)(?P<base64>;base64)?,", re.ASCII)
_BEST_QUALITY = 95
"""The quality of a JPEG where nobody asks for less; above it files grow and pictures do not change."""


class Looks(NamedTuple):
    """What remains of a picture that was decoded to see whether it can be."""

    size: tuple[int, int]
    mode: str


def decode_picture(data: bytes, *, param: str, max_pixels: int) -> Image.Image:
    """Decode an uploaded PNG, JPEG or WebP file: upright, RGB, or RGBA where it has transparency.

    Raises:
        ApiError: 400, naming ``param``: no picture, another format, too large, animated, cut off, or of unknown range.
    """
    try:
        return decode_image(data, formats=WEB_FORMATS, max_pixels=max_pixels)
    except InvalidInputError as error:
        raise refusal(param, str(error), code="invalid_image") from error


def files_at(urls: Sequence[object], settings: ServerSettings, *, param: str) -> list[bytes]:
    """Read the files at data: URLs, or at http(s) ones where the operator allows it. Call this in a thread.

    Together they are no larger than a request may be.

    Raises:
        ApiError: 400, naming ``param``: no such URL, or nothing to fetch there.
    """
    files: list[bytes] = []
    for url in urls:
        text = url if isinstance(url, str) else ""
        if text[:5].lower() == "data:":
            files.append(_decode_data_url(text, param=param))
        elif settings.allow_url_images and text.lower().startswith(("http://", "https://")):
            left = max(settings.max_body_bytes - sum(map(len, files)), 0)
            files.append(fetch(text, max_bytes=left, param=param))
        else:
            how = "; this server fetches no URLs" if text.lower().startswith("http") else ""
            reason = f"a picture is given as {str(url)[:40]!r}: send it as data:image/png;base64,…{how}"
            raise refusal(param, reason, code="invalid_image_url")
    return files


def _decode_data_url(url: str, *, param: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None or not head["base64"]:
        raise refusal(param, "give a URL that begins with data:image/png;base64,", code="invalid_image")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal(param, f"the data URL holds no base64: {error}", code="invalid_image") from error


def check_mask(mask: Looks, like: Looks) -> None:
    """Refuse a mask (ApiError 400) that is transparent nowhere, or has another size than the picture."""
    reason = None
    if mask.mode != "RGBA":
        reason = "it has no transparency: where the picture is to be drawn anew, it must be transparent"
    elif mask.size != like.size:
        sizes = [f"{looks.size[0]} x {looks.size[1]}" for looks in (mask, like)]
        reason = f"it is {sizes[0]}, the picture {sizes[1]} pixels"
    if reason is not None:
        raise refusal("mask", reason, code="invalid_image")


def encode_picture(
    picture: Image.Image, kind: PictureFormat, quality: int | None = None, kept: Mapping[str, Any] | None = None
) -> bytes:
    """Encode a picture as a file. In a JPEG, transparent pixels become white: it has no transparency.

    ``quality`` is that of JPEG and WebP, 0 … 100; None for the best that is worth its bytes. ``kept`` are the settings
    that the file keeps, see drawing_settings().
    """
    more = save_options(kind.upper(), picture, kept or {})
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG", **more)
    elif kind == "webp":
        picture.save(file, "WEBP", quality=_BEST_QUALITY if quality is None else quality, **more)
    else:
        if picture.mode == "RGBA":
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        wanted = _BEST_QUALITY if quality is None else max(quality, 1)
        picture.convert("RGB").save(
            file, "JPEG", quality=wanted, subsampling=0 if wanted >= _BEST_QUALITY else -1, **more
        )
    return file.getvalue()


def as_base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")
