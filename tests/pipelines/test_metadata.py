"""What a picture was drawn with, in its file and back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from omni_sp import InvalidInputError, Omni, OmniDiffusionSamplingParams, __version__
from omni_sp.cli import main
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.metadata import drawing_settings, model_name, read_settings, save_options
from omni_sp.pipelines.shapes import SHAPES_MODEL

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
SETTINGS: dict[str, Any] = {
    "prompt": 'a "red" circle,\nauf Grün: 赤い {丸}',
    "negative_prompt": "blue",
    "seed": 2**63 - 1,
    "width": 24,
    "height": 16,
    "num_inference_steps": 3,
    "true_cfg_scale": 2.5,
    "model": "org/name",
    "layout": "2 ranks",
    "version": f"Omni-SP {__version__}",
}
TAKES = PipelineCapabilities(
    name="Takes",
    parameters={
        "prompt": None, "negative_prompt": None, "num_inference_steps": 50, "guidance_scale": 3.5,
        "true_cfg_scale": 4.0, "num_images_per_prompt": 1, "image": None,
    },
)  # fmt: skip


def file_with(kind: str, settings: dict[str, Any], picture: Image.Image = PICTURE) -> io.BytesIO:
    file = io.BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {}
    picture.save(file, kind, **more, **save_options(kind, picture, settings))
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_settings_come_back_and_pixels_stay(kind: str) -> None:
    file = file_with(kind, SETTINGS)
    assert read_settings(file) == SETTINGS
    file.seek(0)
    with Image.open(file) as kept, Image.open(file_with(kind, {})) as bare:
        assert kept.tobytes() == bare.tobytes()
    if kind == "PNG":
        with Image.open(file_with(kind, SETTINGS)) as image:
            assert image.text["prompt"] == SETTINGS["prompt"]  # type: ignore[attr-defined]
            assert image.text["seed"] == str(2**63 - 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_texts_that_files_cannot_hold(kind: str) -> None:
    long = read_settings(file_with(kind, SETTINGS | {"prompt": "ü" * 32_000}))
    assert long["prompt"] == ("ü" * 32_000 if kind == "PNG" else "(too long for this format)")
    assert long["seed"] == SETTINGS["seed"]
    assert read_settings(file_with(kind, SETTINGS | {"prompt": "a\ud800"}))["seed"] == SETTINGS["seed"]
    assert read_settings(file_with(kind, SETTINGS | {"seed": [1, 2]}))["seed"] == [1, 2]


def test_files_that_keep_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    with pytest.raises(InvalidInputError, match="keeps nothing about how it was drawn"):
        read_settings(path)
    path.write_bytes(b"text")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_settings(path)
    for comment in (b"ASCII\0\0\0{", b"ASCII\0\0\0[1]", b"ASCII\0\0\0" + b"[" * 5000, b"other"):
        exif = Image.Exif()
        exif[0x8769] = {0x9286: comment}
        PICTURE.save(path.with_suffix(".jpg"), exif=exif)
        with pytest.raises(InvalidInputError):
            read_settings(path.with_suffix(".jpg"))


def test_what_is_kept_asks_for_the_same_picture() -> None:
    arguments = {
        "prompt": "a",
        "negative_prompt": " ",
        "true_cfg_scale": 2.0,
        "image": PICTURE,
        "num_images_per_prompt": 2,
    }
    kept = drawing_settings(TAKES, arguments, model="m", layout="1 rank", prompt="a", seed=7)
    assert kept == {
        "prompt": "a", "seed": 7, "num_inference_steps": 50, "guidance_scale": 3.5, "true_cfg_scale": 2.0,
        "num_outputs_per_prompt": 2, "model": "m", "layout": "1 rank", "version": f"Omni-SP {__version__}",
    }  # fmt: skip
    arguments["num_images_per_prompt"] = 1
    assert "num_outputs_per_prompt" not in drawing_settings(TAKES, arguments, model="m", layout="", prompt="a")
    # Without a negative prompt the pipeline leaves its guidance out, and a scale would switch it on.
    assert "true_cfg_scale" not in drawing_settings(TAKES, {"prompt": "a"}, model="m", layout="", prompt="a")


def test_a_models_name_shows_no_folder(tmp_path: Path) -> None:
    assert model_name("Qwen/Qwen-Image") == "Qwen/Qwen-Image"
    assert model_name(SHAPES_MODEL) == SHAPES_MODEL
    assert model_name(str(tmp_path / "tiny")) == model_name("../x/tiny") == model_name("~/secret/models/tiny") == "tiny"


def test_the_settings_of_a_picture_draw_it_again() -> None:
    with Omni(SHAPES_MODEL, device="cpu") as omni:
        params = OmniDiffusionSamplingParams(height=64, width=80, num_inference_steps=2)
        first = omni.generate("a red circle", params)[0]
        kept = read_settings(file_with("PNG", first.settings, first.images[0]))
        asked = {name: kept[name] for name in ("height", "width", "num_inference_steps", "seed")}
        assert asked["height"], asked["width"] == (64, 80)
        again = omni.generate(kept["prompt"], OmniDiffusionSamplingParams(**asked))[0]
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
    assert (kept["model"], kept["layout"]) == (SHAPES_MODEL, "1 rank, nothing is split")


@pytest.mark.parametrize("seed", ["[" * 100_000, "NaN", '{"a": 1}', "null", "[1, [2]]", "7\x1b[2J"])
def test_numbers_of_a_file_that_anybody_made(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = PngInfo()
    known.add_text("version", "Omni-SP 1")
    known.add_text("prompt", "a\nseed 5")
    known.add_text("seed", seed)
    path = tmp_path / "a.png"
    PICTURE.save(path, pnginfo=known)
    assert read_settings(path)["seed"] == seed
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "a\\nseed 5" in shown
