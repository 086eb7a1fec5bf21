"""Image files as the images that pipelines take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from omni_sp.errors import InvalidInputError

if TYPE_CHECKING:
    from omni_sp.pipelines.capabilities import PipelineCapabilities

WEB_FORMATS = ("PNG", "JPEG", "WebP")
"""The formats that every browser shows."""


def decode_image(
    source: Path | bytes,
    *,
    formats: Sequence[str] | None = None,
    max_pixels: int | None = None,
    allow_animated: bool = True,
) -> Image.Image:
    """Read an image upright: RGB, or RGBA where it has transparency.

    The header of a file says its size, so an image of too many pixels is refused before any of them is decoded.

    Args:
        formats: the only formats to read, such as WEB_FORMATS; None for all that Pillow reads.
        max_pixels: the most pixels, width × height; None for no more than Pillow's own limit.
        allow_animated: whether the first frame of an animated image is taken; otherwise the image is refused.

    Raises:
        InvalidInputError: the image cannot be read, or is refused. The message is the reason alone: callers put the
            name of their argument before it.
    """

    def refusal(error: Exception, reason: str) -> InvalidInputError:
        # Of a path Pillow's own words say more; of bytes they would show the address of an object.
        return InvalidInputError(str(error) if isinstance(source, Path) else reason)

    if source == b"":
        raise InvalidInputError("the file is empty")
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        image = Image.open(file, formats=None if formats is None else [name.upper() for name in formats])
        frames = 1 if allow_animated else getattr(image, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = max_pixels or Image.MAX_IMAGE_PIXELS
        raise refusal(error, f"it has more than {limit} pixels, which is the most here") from error
    except Exception as error:  # a parser may raise anything on bytes that somebody sent
        kinds = "image" if formats is None else f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise refusal(error, f"it is no {kinds} file, or a damaged one") from error
    with image:
        pixels = image.width * image.height
        if max_pixels is not None and pixels > max_pixels:
            raise InvalidInputError(
                f"{image.width} x {image.height} = {pixels} pixels are more than {max_pixels}, which is the most here"
            )
        if frames > 1:
            raise InvalidInputError(f"it is animated ({frames} pictures): give a single one")
        try:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        except Exception as error:
            raise refusal(error, f"the {image.format} file is damaged or cut off") from error


def input_image(
    images: Sequence[Image.Image], capabilities: PipelineCapabilities
) -> Image.Image | list[Image.Image] | None:
    """The images of a user as the image of a Prompt, in the mode that the pipeline reads: one, several, or None."""
    converted = [image.convert(capabilities.image_mode) for image in images]
    return converted if len(converted) > 1 else next(iter(converted), None)
