"""The evaluation stage: what share of an exported pipeline's pictures show what was asked."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from omni_sp.pipelines.shapes import SHAPES_CALL
from training.shapes.autoencoder import decode_pictures, encode_pictures
from training.shapes.judge import Verdict, judge
from training.shapes.pool import is_held_out
from training.shapes.world import PICTURE_SIZE, Scene, num_captions, random_scene

__all__ = ["draw_prompts", "evaluate", "evaluation_prompts"]

_BATCH_SIZE = 16
_CAPTION_HEIGHT = 22


def evaluation_prompts(num_prompts: int, *, only_held_out: bool = False, seed: int = 1234) -> list[tuple[Scene, str]]:
    """Return random scenes without offset, each with one of its captions.

    Args:
        num_prompts: How many.
        only_held_out: Take only scenes whose combination of shape and colours was never trained on.
        seed: Decides the scenes and the captions.
    """
    rng = np.random.default_rng(seed)
    prompts: list[tuple[Scene, str]] = []
    while len(prompts) < num_prompts:
        drawn = random_scene(rng)
        if only_held_out and not is_held_out(drawn):
            continue
        scene = Scene(
            shape=drawn.shape,
            colour=drawn.colour,
            background=drawn.background,
            size=drawn.size,
            position=drawn.position,
        )
        prompts.append((scene, scene.caption(int(rng.integers(num_captions())))))
    return prompts


def draw_prompts(pipeline: DiffusionPipeline, captions: list[str], *, seed: int = 0) -> list[Image.Image]:
    """Draw captions with the plain pipeline, in batches, each picture from its own generator."""
    images: list[Image.Image] = []
    for first in range(0, len(captions), _BATCH_SIZE):
        batch = captions[first : first + _BATCH_SIZE]
        generators = [torch.Generator("cpu").manual_seed(seed + first + i) for i in range(len(batch))]
        # The pipeline does not repeat a single negative prompt for a batch.
        call = {**SHAPES_CALL, "negative_prompt": [SHAPES_CALL["negative_prompt"]] * len(batch)}
        images += pipeline(batch, generator=generators, **call).images
    return images


def evaluate(folder: Path, device: torch.device, *, num_prompts: int = 64, sheet: Path | None = None) -> None:
    """Draw random prompts, and as many of combinations never trained on, and print what share is right.

    Args:
        folder: An exported pipeline.
        device: Where to draw.
        num_prompts: How many prompts of either kind.
        sheet: Where to write the first sixteen pictures with their captions, if anywhere.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = evaluation_prompts(num_prompts)
    _report_reconstruction(pipeline, [scene for scene, _ in prompts[:16]])
    images = _report_prompts(pipeline, "random prompts", prompts)
    held_out = evaluation_prompts(num_prompts, only_held_out=True)
    _report_prompts(pipeline, "combinations never trained on", held_out)
    if sheet is not None:
        _contact_sheet(images[:16], [caption for _, caption in prompts[:16]]).save(sheet)


def _report_prompts(pipeline: DiffusionPipeline, name: str, prompts: list[tuple[Scene, str]]) -> list[Image.Image]:
    """Draw prompts, print what the judge says of the pictures, and return them."""
    start = time.monotonic()
    images = draw_prompts(pipeline, [caption for _, caption in prompts])
    seconds = (time.monotonic() - start) / len(prompts)
    verdicts = [judge(image, scene) for image, (scene, _) in zip(images, prompts, strict=True)]
    print(f"evaluate, {name}: {_summary(verdicts)}, {seconds:.2f} s for a picture", flush=True)
    for verdict, (_, caption) in zip(verdicts, prompts, strict=True):
        if not verdict.right:
            found = f"{verdict.found_colour} {verdict.found_shape} on {verdict.found_background}"
            print(f"evaluate, {name}: wrong: {caption!r} shows {found}", flush=True)
    return images


def _summary(verdicts: list[Verdict]) -> str:
    """The shares of verdicts that are right, as text."""
    shares = {name: np.mean([getattr(v, name) for v in verdicts]) for name in ("background", "colour", "shape")}
    shares["all three"] = np.mean([v.right for v in verdicts])
    shares["position"] = np.mean([v.position for v in verdicts])
    shares["mean overlap"] = np.mean([v.overlap for v in verdicts])
    return f"{len(verdicts)} pictures, " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


def _report_reconstruction(pipeline: DiffusionPipeline, scenes: list[Scene]) -> None:
    """Print what the judge says of ideal drawings and of what the autoencoder makes of them: both should be right."""
    ideal = [scene.draw() for scene in scenes]
    pictures = torch.from_numpy(np.stack([np.asarray(image) for image in ideal])).permute(0, 3, 1, 2)
    decoded = decode_pictures(pipeline.vae, encode_pictures(pipeline.vae, pictures)).cpu()
    psnr = 10 * np.log10(255**2 / (decoded.float() - pictures.float()).square().mean().item())
    reconstructed = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in decoded]
    for name, images in (("ideal drawings", ideal), (f"reconstructions, {psnr:.1f} dB", reconstructed)):
        verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
        print(f"evaluate, {name}: {_summary(verdicts)}", flush=True)


def _contact_sheet(images: list[Image.Image], captions: list[str], num_columns: int = 4) -> Image.Image:
    """Put pictures side by side, each above its caption."""
    height = PICTURE_SIZE + _CAPTION_HEIGHT
    num_rows = -(-len(images) // num_columns)
    sheet = Image.new("RGB", (num_columns * PICTURE_SIZE, num_rows * height), "white")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, num_columns)
        sheet.paste(image, (column * PICTURE_SIZE, row * height))
        corner = (column * PICTURE_SIZE + 2, row * height + PICTURE_SIZE + 4)
        ImageDraw.Draw(sheet).text(corner, caption, fill="black", font_size=8.5)
    return sheet
