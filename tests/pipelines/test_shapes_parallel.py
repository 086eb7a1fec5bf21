"""The demo model on several ranks: the picture of one process, at the size it was made for and at an awkward one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.pipelines.shapes import SHAPES_CALL, shapes_folder
from omni_sp.testing.ranks import RankPool
from tests.thorough import THOROUGH

PROMPTS = ["a red circle on a blue background", "a large green star at the top right of a black background"]
CALLS: dict[str, dict[str, Any]] = {
    "256 x 256": {},
    # 62 x 63 tokens; up to the latent, since every rank would decode a million pixels here.
    "1000 x 1016": {"height": 1000, "width": 1016, "num_inference_steps": 2, "output_type": "latent"},
    "two prompts": {"prompt": PROMPTS, "negative_prompt": [" ", "a circle"], "num_inference_steps": 4},
}


def draw(pipe: Any, name: str) -> Any:
    """Pixels of the pictures of one call, as whole numbers from 0 to 255; or the latent."""
    call: dict[str, Any] = {"prompt": PROMPTS[0], **SHAPES_CALL, **CALLS[name]}
    images = pipe(**call, generator=torch.Generator().manual_seed(11)).images
    if isinstance(images, torch.Tensor):
        return images.numpy()
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def load() -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(shapes_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache
def one_process(name: str) -> Any:
    return draw(load(), name)


def parallel(mesh: ParallelMesh, name: str) -> tuple[Any, dict[str, int]]:
    pipe = load()
    handle = parallelize(pipe, mesh)
    return draw(pipe, name), handle.tokens


# The demo model's blocks are those of Qwen-Image, which tests/sharding tries on all layouts.
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 3), *([(3, 1), (4, 1)] if THOROUGH else [])], ids=str)
def test_the_picture_is_that_of_one_process(ranks: RankPool, ulysses: int, ring: int) -> None:
    wanted = one_process("256 x 256")
    assert wanted.shape == (1, 256, 256, 3)
    for pixels, tokens in ranks.run(parallel, "256 x 256", ulysses=ulysses, ring=ring):
        assert np.abs(pixels - wanted).max() <= 2
        assert tokens == {"hidden_states": 256, "encoder_hidden_states": 12}


@pytest.mark.parametrize(("name", "tolerance"), [("1000 x 1016", 1e-4), ("two prompts", 2)])
def test_awkward_calls_are_exact_too(ranks: RankPool, name: str, tolerance: float) -> None:
    wanted = one_process(name)
    assert wanted.std() > 0.1
    for got, _ in ranks.run(parallel, name, ulysses=2, ring=2, timeout=300):
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= tolerance
