"""Image files of every kind, whole and damaged, by path and by content."""

from __future__ import annotations

import base64
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from omni_sp import InvalidInputError, OmniDiffusionSamplingParams, SamplingParamsError
from omni_sp.files import read_picture
from omni_sp.pipelines.arguments import Prompt, call_arguments
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.images import WEB_FORMATS, EncodedImage, decode_image, standard_image
from omni_sp.server.pictures import decode_picture, files_at
from omni_sp.server.settings import ServerSettings


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = file_of(Image.new("RGB", (20, 10)), "PNG")


def two_pictures(kind: str, colour: str = "black") -> bytes:
    return file_of(
        Image.new("RGB", (8, 8), colour), kind, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )


GIF = two_pictures("GIF")
ANIMATED = "it is animated, or has pages (2 pictures): give a single one"
# Greys of 16 bits, and what they are in 8.
DEEP = np.array([[0, 128, 129], [257, 32767, 65535]], np.uint16)
LEVELS = [0, 0, 1, 1, 127, 255]
INPAINTS = PipelineCapabilities(
    name="Inpaints", parameters={"prompt": None, "image": None, "mask_image": None, "control_image": None}
)


def channel(image: Image.Image, number: int = 0) -> list[int]:
    return list(np.asarray(image)[..., number].ravel().tolist())


def refusal(source: Path | bytes, **options: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        decode_image(source, **options)
    return str(caught.value)


def test_images_are_upright_and_keep_transparency() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    assert decode_image(file_of(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)
    assert decode_image(file_of(Image.new("RGBA", (4, 4)), "PNG")).mode == "RGBA"
    assert decode_image(file_of(Image.new("L", (4, 4)), "PNG")).mode == "RGB"


def test_a_path_is_read_like_its_content_and_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    assert decode_image(path).tobytes() == decode_image(PNG).tobytes()
    assert refusal(tmp_path / "none.png").startswith("[Errno 2]")
    path.write_bytes(b"text")
    assert refusal(path) == f"cannot identify image file {str(path)!r}"


def test_reasons_for_content_are_our_own_words() -> None:
    assert refusal(b"") == "the file is empty"
    assert refusal(b"text") == "it is no image file, or a damaged one"
    assert refusal(GIF, formats=WEB_FORMATS) == "it is no PNG, JPEG or WebP file, or a damaged one"
    assert refusal(PNG[:45], formats=WEB_FORMATS) == "the PNG file is damaged or cut off"


def test_limits() -> None:
    assert decode_image(PNG, max_pixels=200).size == (20, 10)
    assert refusal(PNG, max_pixels=199) == "20 x 10 = 200 pixels are more than 199, which is the most here"


def read_by_file(data: bytes, folder: Path) -> Image.Image:
    path = folder / "picture"
    path.write_bytes(data)
    return read_picture(str(path))


def read_by_upload(data: bytes, folder: Path) -> Image.Image:
    return decode_picture(data, param="image", max_pixels=10_000)


def read_by_url(data: bytes, folder: Path) -> Image.Image:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    (file,) = files_at([url], ServerSettings(), param="messages")
    return decode_picture(file, param="messages", max_pixels=10_000)


def read_by_rank(data: bytes, folder: Path) -> Image.Image:
    """What waits as its file, where it arrives in a rank process."""
    prompt = Prompt(text="x", image=EncodedImage(data))
    image = pickle.loads(pickle.dumps(call_arguments(INPAINTS, prompt, OmniDiffusionSamplingParams())))["image"]
    assert isinstance(image, Image.Image)
    return image


def read_by_pillow(data: bytes, folder: Path) -> Image.Image:
    """An image that somebody opens and hands to Omni."""
    prompt = Prompt(text="x", image=Image.open(io.BytesIO(data)))
    image = call_arguments(INPAINTS, prompt, OmniDiffusionSamplingParams())["image"]
    assert isinstance(image, Image.Image)
    return image


DOORS = [read_by_file, read_by_upload, read_by_url, read_by_pillow, read_by_rank]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_reads_the_same(door: Any, tmp_path: Path) -> None:
    def levels(image: Image.Image, kind: str = "PNG", **options: Any) -> list[Any]:
        read = door(file_of(image, kind, **options), tmp_path)
        assert read.mode in ("RGB", "RGBA")
        return channel(read.convert("RGB"))

    assert levels(Image.fromarray(DEEP)) == LEVELS
    assert levels(Image.fromarray(np.array([[True, False]]))) == [255, 0]
    assert levels(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100) == [255]
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([9, 0, 0, 200, 0, 0])
    paletted.putpixel((1, 0), 1)
    assert levels(paletted, transparency=0) == levels(paletted) == [9, 200]
    assert levels(Image.new("LA", (1, 1), (77, 0))) == [77]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert door(file_of(Image.fromarray(DEEP), "PNG", exif=exif), tmp_path).size == (2, 3)
    phone = two_pictures("MPO", "blue")
    assert door(phone, tmp_path).getpixel((0, 0))[2] > 250
    for kind in ("PNG", "WEBP"):
        with pytest.raises(Exception, match=re.escape(ANIMATED)):
            door(two_pictures(kind), tmp_path)


@pytest.mark.parametrize("door", [read_by_file, read_by_pillow])
def test_formats_that_servers_do_not_take(door: Any, tmp_path: Path) -> None:
    def levels(image: Image.Image, kind: str = "TIFF", **options: Any) -> list[Any]:
        return channel(door(file_of(image, kind, **options), tmp_path))

    for kind in ("TIFF", "PPM", "JPEG2000"):
        options = {"irreversible": False} if kind == "JPEG2000" else {}
        assert levels(Image.fromarray(DEEP), kind, **options) == LEVELS, kind
    big_endian = Image.frombytes("I;16B", (3, 2), DEEP.astype(">u2").tobytes())
    assert levels(big_endian) == LEVELS
    assert levels(Image.fromarray(np.array([[0.0, 0.25, 1.0]], np.float32))) == [0, 64, 255]
    inverted = TiffImagePlugin.ImageFileDirectory_v2()
    inverted[262] = 0  # white is zero
    assert levels(Image.fromarray(DEEP), tiffinfo=inverted) == [255 - level for level in LEVELS]
    for numbers, words in [
        (np.array([[0, 70000]], np.int32), "mode I, from 0 to 70000"),
        (np.array([[0.0, 1.5]], np.float32), "floats from 0 to 1.5"),
        (np.array([[-0.1, 1.0]], np.float32), "floats from -0.1 to 1"),
        (np.array([[0.5, np.nan]], np.float32), "floats from nan to nan"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            door(file_of(Image.fromarray(numbers), "TIFF"), tmp_path)
    for kind in ("GIF", "TIFF"):
        with pytest.raises(InvalidInputError, match=re.escape(ANIMATED)):
            door(two_pictures(kind), tmp_path)


def test_a_grey_that_means_transparent_in_16_bits() -> None:
    image = decode_image(file_of(Image.fromarray(DEEP), "PNG", transparency=257))
    assert image.mode == "RGBA"
    assert channel(image, 3) == [255, 255, 255, 0, 255, 255]


def test_images_of_all_arguments_are_read_alike() -> None:
    extra = {"mask_image": Image.fromarray(DEEP), "control_image": [Image.fromarray(DEEP)]}
    colours = Image.new("RGB", (3, 2))
    arguments = call_arguments(INPAINTS, Prompt(text="x", image=colours), OmniDiffusionSamplingParams(extra_args=extra))
    assert arguments["image"] is colours
    assert arguments["mask_image"].mode == "L"
    assert channel(arguments["mask_image"].convert("RGB")) == LEVELS
    assert arguments["control_image"][0].mode == "RGB"
    assert channel(arguments["control_image"][0], 2) == LEVELS
    bad = OmniDiffusionSamplingParams(extra_args={"mask_image": Image.new("I", (3, 2), 70000)})
    with pytest.raises(SamplingParamsError, match="mask_image: it has whole numbers of 32 bits") as caught:
        call_arguments(INPAINTS, Prompt(text="x", image=colours), bad)
    assert caught.value.param == "mask_image"
    cut_off = Image.open(io.BytesIO(PNG[:45]))
    with pytest.raises(SamplingParamsError, match=r"image: .*truncated"):
        call_arguments(INPAINTS, Prompt(text="x", image=[cut_off]), OmniDiffusionSamplingParams())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
def test_modes_of_pillow(mode: str) -> None:
    white = Image.new("RGB", (2, 1), "white")
    image = standard_image(white.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode))
    wanted = {"1": "L", "L": "L", "LA": "RGBA", "La": "RGBA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
    assert image.mode == wanted.get(mode, "RGB")
    assert image.convert("RGB").getpixel((1, 0)) == (255, 255, 255)
