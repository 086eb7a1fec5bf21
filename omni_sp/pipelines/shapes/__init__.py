"""The embedded demo model: a tiny Qwen-Image pipeline that draws coloured shapes.

It needs no download: the weights lie in the package.  It is for trying, testing and benchmarking, no more.

    >>> from diffusers import DiffusionPipeline
    >>> from omni_sp.pipelines.shapes import SHAPES_CALL, shapes_folder
    >>> pipeline = DiffusionPipeline.from_pretrained(shapes_folder())
    >>> image = pipeline("a red circle on a blue background", **SHAPES_CALL).images[0]

`world` holds what the model knows (its words and what they mean), `judge` says whether a picture shows what was asked.
Importing this package imports neither torch nor diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["SHAPES_CALL", "SHAPES_MODEL", "shapes_folder"]

SHAPES_MODEL = "omni-sp/shapes"

# The arguments to call the pipeline with.  Its own default is 1024 x 1024 pixels, which the model has never seen, and
# the negative prompt must not be None for classifier-free guidance to happen.
SHAPES_CALL: Mapping[str, Any] = MappingProxyType(
    {"height": 256, "width": 256, "num_inference_steps": 12, "true_cfg_scale": 2.0, "negative_prompt": " "}
)


def shapes_folder() -> Path:
    """Return the folder of the shipped diffusers pipeline, inside the installed package."""
    return Path(__file__).resolve().parent / "weights"
