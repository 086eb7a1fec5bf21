"""The demo model: the scenes it was trained on, the judge of its images, and the images of the shipped weights."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL, shapes_folder
from tests.thorough import THOROUGH
from training.shapes.judge import judge
from training.shapes.world import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    num_captions,
    random_scene,
    unit_outline,
)

_NUM_PROMPTS = 64 if THOROUGH else 16
_BATCH_SIZE = 16


@pytest.fixture(scope="module")
def pipeline() -> DiffusionPipeline:
    loaded = DiffusionPipeline.from_pretrained(shapes_folder())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _random_scenes(num_scenes: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(num_scenes)]


def test_scenes_and_judge_need_no_torch() -> None:
    for file in (Path(inspect.getfile(item)) for item in (shapes_folder, Scene, judge)):
        imports = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert imports.isdisjoint({"torch", "diffusers", "transformers"}), file


def test_folder_lies_in_the_package() -> None:
    assert SHAPES_MODEL == "omni-sp/shapes"
    assert shapes_folder().is_dir()


class TestWorld:
    def test_captions_say_the_scene(self) -> None:
        scene = Scene(shape="star", colour="red", background="orange", size="small", position="at the top left")
        assert [scene.caption(variant) for variant in range(num_captions())] == [
            "a small red star at the top left on an orange background",
            "a small red star on an orange background, at the top left",
            "small red star at the top left, orange background",
            "a small red star at the top left of an orange background",
        ]
        plain = Scene(shape="circle", colour="orange", background="blue")
        assert plain.caption() == "an orange circle on a blue background"
        assert plain.caption(3) == "an orange circle in the middle of a blue background"

    def test_seed_decides_scenes(self) -> None:
        assert _random_scenes(8, seed=3) == _random_scenes(8, seed=3)
        assert _random_scenes(8, seed=3) != _random_scenes(8, seed=4)

    def test_random_scenes_use_every_word(self) -> None:
        scenes = _random_scenes(400, seed=0)
        assert {scene.shape for scene in scenes} == set(SHAPES)
        assert {scene.colour for scene in scenes} == {scene.background for scene in scenes} == set(COLOURS)
        assert {scene.size for scene in scenes} == set(SIZES)
        assert {scene.position for scene in scenes} == set(POSITIONS)

    @pytest.mark.parametrize(
        ("field", "word"),
        [("shape", "cube"), ("colour", "pink"), ("background", "pink"), ("size", "huge"), ("position", "left")],
    )
    def test_unknown_words_are_refused(self, field: str, word: str) -> None:
        words = {"shape": "circle", "colour": "red", "background": "blue", field: word}
        with pytest.raises(ValueError, match=f"{field}='{word}' is not one of"):
            Scene(**words)  # type: ignore[arg-type]

    def test_equal_colours_are_refused(self) -> None:
        with pytest.raises(ValueError, match="colour == background == 'red'"):
            Scene(shape="circle", colour="red", background="red")

    def test_drawing_has_both_colours_and_the_circle_its_area(self) -> None:
        scene = Scene(shape="circle", colour="red", background="blue", size="large", position="on the left")
        pixels = np.asarray(scene.draw())
        assert pixels.shape == (256, 256, 3)
        assert tuple(pixels[0, -1]) == COLOURS["blue"]
        assert tuple(pixels[128, round(0.31 * 256)]) == COLOURS["red"]
        share = coverage(scene.outline(), 256).mean()
        assert share == pytest.approx(np.pi * SIZES["large"] ** 2, rel=0.01)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_shape_stays_inside_the_picture(self, shape: str) -> None:
        for position in POSITIONS:
            scene = Scene(
                shape=shape, colour="red", background="blue", size="large", position=position, offset=(0.01, -0.01)
            )
            assert 0 < scene.outline().min() < scene.outline().max() < 1

    @pytest.mark.parametrize("shape", SHAPES)
    def test_unit_outline_is_centred(self, shape: str) -> None:
        outline = unit_outline(shape)
        np.testing.assert_allclose(outline.min(axis=0), -outline.max(axis=0), atol=1e-12)


class TestJudge:
    def test_ideal_drawings_are_right(self) -> None:
        for scene in _random_scenes(64, seed=1):
            verdict = judge(scene.draw(), scene)
            assert verdict.right, (scene, verdict)
            assert verdict.position, (scene, verdict)
            assert verdict.overlap > 0.95, (scene, verdict)

    @pytest.mark.parametrize("picture_size", [64, 512])
    def test_any_resolution(self, picture_size: int) -> None:
        for scene in _random_scenes(8, seed=2):
            assert judge(scene.draw(picture_size), scene).right, scene

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("other", SHAPES)
    def test_sees_the_shape_drawn(self, shape: str, other: str) -> None:
        drawn = Scene(shape=shape, colour="green", background="yellow", size="small", position="at the top")
        verdict = judge(drawn.draw(), dataclasses.replace(drawn, shape=other))
        assert verdict.found_shape == shape
        assert verdict.shape == (shape == other)
        assert verdict.background
        assert verdict.colour

    def test_sees_wrong_colours(self) -> None:
        drawn = Scene(shape="square", colour="orange", background="black")
        wrong_colour = judge(drawn.draw(), dataclasses.replace(drawn, colour="yellow"))
        assert (wrong_colour.colour, wrong_colour.background, wrong_colour.right) == (False, True, False)
        assert wrong_colour.found_colour == "orange"
        wrong_background = judge(drawn.draw(), dataclasses.replace(drawn, background="purple"))
        assert (wrong_background.colour, wrong_background.background, wrong_background.right) == (True, False, False)
        assert wrong_background.found_background == "black"
        exchanged = judge(drawn.draw(), dataclasses.replace(drawn, colour="black", background="orange"))
        assert (exchanged.colour, exchanged.background) == (False, False)

    def test_sees_wrong_position_and_size(self) -> None:
        drawn = Scene(shape="circle", colour="white", background="blue", position="on the left")
        elsewhere = judge(drawn.draw(), dataclasses.replace(drawn, position="on the right"))
        assert elsewhere.right
        assert not elsewhere.position
        assert elsewhere.overlap == 0
        larger = judge(drawn.draw(), dataclasses.replace(drawn, size="large"))
        assert larger.position
        assert larger.overlap == pytest.approx((SIZES[""] / SIZES["large"]) ** 2, abs=0.02)

    def test_a_plain_picture_has_no_object(self) -> None:
        verdict = judge(
            Image.new("RGB", (256, 256), COLOURS["red"]), Scene(shape="star", colour="blue", background="red")
        )
        assert verdict.background
        assert (verdict.found_colour, verdict.found_shape, verdict.right) == (None, None, False)

    def test_only_square_pictures(self) -> None:
        with pytest.raises(ValueError, match="width=256 and height=128"):
            judge(Image.new("RGB", (256, 128)), Scene(shape="star", colour="blue", background="red"))


class TestShippedPipeline:
    def test_size_limit(self) -> None:
        assert sum(file.stat().st_size for file in shapes_folder().rglob("*")) <= 20_000_000

    def test_has_card_and_no_trace_of_its_origin(self) -> None:
        assert "Apache-2.0" in (shapes_folder() / "README.md").read_text()
        configurations = [file.read_text() for file in shapes_folder().rglob("*.json")]
        assert len(configurations) >= 6
        for text in configurations:
            assert "_name_or_path" not in text
            assert "/tmp" not in text
        index = json.loads((shapes_folder() / "model_index.json").read_text())
        assert index["_class_name"] == "QwenImagePipeline"

    def test_template_prefix_is_what_the_pipeline_drops(self, pipeline: DiffusionPipeline) -> None:
        prefix = pipeline.prompt_template_encode.split("{}")[0]
        assert len(pipeline.tokenizer(prefix).input_ids) == pipeline.prompt_template_encode_start_idx == 34

    def test_every_word_is_one_token(self, pipeline: DiffusionPipeline) -> None:
        for scene in _random_scenes(32, seed=5):
            caption = scene.caption()
            embeddings, mask = pipeline.encode_prompt(caption)
            assert mask is None
            assert embeddings.shape == (1, len(caption.split()) + 5, 64)

    def test_any_text_can_be_encoded(self, pipeline: DiffusionPipeline) -> None:
        text = "Ein Dreieck, größer als 3 ★?"
        assert pipeline.tokenizer.decode(pipeline.tokenizer(text).input_ids) == text

    def test_autoencoder_keeps_what_the_judge_looks_at(self, pipeline: DiffusionPipeline) -> None:
        scenes = _random_scenes(8, seed=6)
        drawings = torch.from_numpy(np.stack([np.asarray(scene.draw()) for scene in scenes]))
        pictures = drawings.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
        with torch.no_grad():
            decoded = pipeline.vae.decode(pipeline.vae.encode(pictures).latent_dist.mode()).sample[:, :, 0]
        for image, scene in zip(pipeline.image_processor.postprocess(decoded), scenes, strict=True):
            verdict = judge(image, scene)
            assert verdict.right, (scene, verdict)
            assert verdict.overlap > 0.9, (scene, verdict)

    def test_pictures_show_what_was_asked(self, pipeline: DiffusionPipeline) -> None:
        rng = np.random.default_rng(2024)
        scenes = [random_scene(rng) for _ in range(_NUM_PROMPTS)]
        captions = [scene.caption(int(rng.integers(num_captions()))) for scene in scenes]
        images: list[Image.Image] = []
        for first in range(0, _NUM_PROMPTS, _BATCH_SIZE):
            batch = captions[first : first + _BATCH_SIZE]
            call = {**SHAPES_CALL, "negative_prompt": [SHAPES_CALL["negative_prompt"]] * len(batch)}
            images += pipeline(batch, generator=torch.Generator().manual_seed(first), **call).images
        verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
        wrong = [(caption, v) for caption, v in zip(captions, verdicts, strict=True) if not v.right]
        assert len(verdicts) == _NUM_PROMPTS
        assert len(wrong) <= 0.1 * _NUM_PROMPTS, wrong
        assert np.mean([verdict.position for verdict in verdicts]) >= 0.9
