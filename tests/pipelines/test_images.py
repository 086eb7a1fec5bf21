"""Image files of every kind, whole and damaged, by path and by content."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni_sp import InvalidInputError
from omni_sp.pipelines.images import WEB_FORMATS, decode_image


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = file_of(Image.new("RGB", (20, 10)), "PNG")
GIF = file_of(
    Image.new("RGB", (8, 8)), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
)  # fmt: skip


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
    assert decode_image(GIF).size == (8, 8)
    assert refusal(GIF, allow_animated=False) == "it is animated (2 pictures): give a single one"
