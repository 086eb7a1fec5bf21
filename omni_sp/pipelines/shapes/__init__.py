"""The embedded demo model: a tiny Qwen-Image pipeline that draws coloured shapes.

Its weights are part of the package. It is meant for trying, testing and benchmarking.

    >>> from diffusers import DiffusionPipeline
    >>> from omni_sp.pipelines.shapes import SHAPES_CALL, shapes_folder
    >>> pipeline = DiffusionPipeline.from_pretrained(shapes_folder())
    >>> image = pipeline("a red circle on a blue background", **SHAPES_CALL).images[0]

The program that trained it, and the judge of its images, are in `training/shapes` of the project's source. Importing
this package imports neither torch nor diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["SHAPES_CALL", "SHAPES_MODEL", "SHAPES_PROMPTS", "shapes_folder"]

SHAPES_MODEL = "omni-sp/shapes"

# The arguments to call the pipeline with. Its class has a default of 1024 x 1024 pixels, a size that the model was not
# trained on, and uses classifier-free guidance only where the negative prompt is not None.
SHAPES_CALL: Mapping[str, Any] = MappingProxyType(
    {"height": 256, "width": 256, "num_inference_steps": 12, "true_cfg_scale": 2.0, "negative_prompt": " "}
)

SHAPES_PROMPTS = (
    "a red circle on a blue background",
    "a large green star on a black background",
    "a small yellow square on a green background",
)
"""What it draws well."""


def shapes_folder() -> Path:
    """Return the folder of the shipped diffusers pipeline, inside the installed package."""
    return Path(__file__).resolve().parent / "weights"
