"""Images as pipelines take them: one decoder of files, and one conversion of PIL images, for every door."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps

from omni_sp.errors import InvalidInputError

WEB_FORMATS = ("PNG", "JPEG", "WebP")
"""The formats that every browser shows."""

_SINGLE_PICTURES = ("MPO", "PSD")
"""Formats whose first picture is the whole picture: the others are a phone's depth or small copies, or layers."""
_SIXTEEN_BITS_AS_I = ("PNG", "PPM")
"""Formats whose 16-bit greys some versions of Pillow read as mode I, with levels of 0 to 65535."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


@dataclass(frozen=True)
class EncodedImage:
    """The file of an image in place of the image: the argument of a call that waits, of which no pixel is in memory.

    It becomes the image where it is unpickled: in the rank processes, which get their calls pickled, one at a time.

    Attributes:
        data: a file of WEB_FORMATS that decode_image() has read before.
        mode: the mode to convert the image to; None for its own.
        is_mask: the image is a mask, white where the file is transparent and black elsewhere.
    """

    data: bytes
    mode: str | None = None
    is_mask: bool = False

    def __repr__(self) -> str:
        return f"<an image file of {len(self.data)} bytes>"

    def __reduce__(self) -> tuple[Callable[..., Image.Image], tuple[Any, ...]]:
        return _unpickled, (self.data, self.mode, self.is_mask)


def _unpickled(data: bytes, mode: str | None, is_mask: bool) -> Image.Image:
    image = decode_image(data, formats=WEB_FORMATS)
    if is_mask:
        return ImageChops.invert(image.getchannel("A"))
    return image if mode in (None, image.mode) else image.convert(mode)


def declared_pixels(data: bytes) -> int:
    """Width × height by the header of an image file; 0 where there is none to read."""
    try:
        with Image.open(io.BytesIO(data), formats=[name.upper() for name in WEB_FORMATS]) as image:
            return image.width * image.height
    except Exception:  # a parser may raise anything; decode_image() says what is wrong
        return 0


def decode_image(
    source: Path | bytes, *, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Read an image file upright, in 8 bits: RGB, or RGBA where it has transparency.

    The header of a file says its size, so an image of too many pixels is refused before any of them is decoded.

    Args:
        formats: the only formats to read, such as WEB_FORMATS; None for all that Pillow reads.
        max_pixels: the most pixels, width × height; None for no more than Pillow's own limit.

    Raises:
        InvalidInputError: the image cannot be read, holds several pictures, has levels of unknown range, or is too
            large. The message is the reason alone: callers put the name of their argument before it.
    """

    def refusal(error: Exception, reason: str) -> InvalidInputError:
        # Of a path Pillow's own words say more; of bytes they would show the address of an object.
        return InvalidInputError(str(error) if isinstance(source, Path) else reason)

    if source == b"":
        raise InvalidInputError("the file is empty")
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        image = Image.open(file, formats=None if formats is None else [name.upper() for name in formats])
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
        try:
            upright = standard_image(image)
            return upright.convert("RGB") if upright.mode == "L" else upright
        except InvalidInputError:
            raise
        except Exception as error:
            raise refusal(error, f"the {image.format} file is damaged or cut off") from error


def standard_image(image: Image.Image) -> Image.Image:
    """An image upright, in 8 bits: L, RGB, or RGBA where it has transparency. One that is so already is returned.

    Levels of 16 bits are scaled from 0 … 65535, floats from 0 … 1: Pillow's own conversions cut them off at 255.

    Raises:
        InvalidInputError: it is animated, or its levels have no known range.
    """
    _require_single(image)
    image.load()  # of a file that is open, here and not later
    upright = _upright(image)
    if image.mode == "I" or image.mode == "F" or image.mode.startswith("I;16"):
        return _scaled(image, upright)
    if image.mode == "La":  # Pillow converts it to LA alone
        upright = upright.convert("LA")
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return upright if upright.mode == mode else upright.convert(mode)


def standard_images(value: Any, mode: str | None) -> Any:
    """A pipeline's argument with every image in it, also in lists, as standard_image(); all else as it is.

    Args:
        mode: the mode to convert them to; None leaves them in their own.

    Raises:
        InvalidInputError: an image that standard_image() refuses.
    """
    if isinstance(value, Image.Image):
        image = standard_image(value)
        return image if mode in (None, image.mode) else image.convert(mode)
    if isinstance(value, EncodedImage):
        return replace(value, mode=mode)
    if type(value) in (list, tuple):
        return type(value)(standard_images(item, mode) for item in value)
    return value


def input_image(images: Sequence[Image.Image | EncodedImage]) -> Any:
    """The images of a user as the image of a Prompt: one, several, or None."""
    return list(images) if len(images) > 1 else next(iter(images), None)


def _require_single(image: Image.Image) -> None:
    """Refuse an image of several pictures, of which any could be meant."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format not in _SINGLE_PICTURES:
        raise InvalidInputError(f"it is animated, or has pages ({count} pictures): give a single one")


def _upright(image: Image.Image) -> Image.Image:
    orientation = image.getexif().get(0x0112, 1)
    # In any other case the function would copy the image.
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _scaled(image: Image.Image, upright: Image.Image) -> Image.Image:
    """The greys of more than 8 bits as L, or RGBA where one level of them means transparent.

    Args:
        image: as it was opened, which knows its file's format.
        upright: its pixels.
    """
    import numpy as np

    tags = getattr(image, "tag_v2", {})
    levels = np.asarray(upright)
    if image.mode == "F":
        _require_unit_range(levels)
        scaled = np.rint(levels * 255.0)
    elif image.mode == "I" and image.format not in _SIXTEEN_BITS_AS_I:
        low, high = upright.getextrema()
        raise InvalidInputError(
            f"it has whole numbers of 32 bits, or signed ones (mode I, from {low} to {high}), whose range nobody "
            "knows: save it with 8 or 16 bits, or as floats from 0 to 1"
        )
    else:
        most = 2 ** tags.get(_TIFF_BITS, (16,))[0] - 1
        scaled = np.rint(np.arange(most + 1) * (255.0 / most)).astype(np.uint8)[levels]
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _require_unit_range(levels: Any) -> None:
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that nan is refused as well
        raise InvalidInputError(
            f"it has floats from {low:g} to {high:g}, and those from 0 (black) to 1 (white) can be read: scale them"
        )
