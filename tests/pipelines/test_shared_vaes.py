"""Whole pipelines whose autoencoders run over the ranks: the picture of one process, and which calls are shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, ParallelMesh, parallelize
from omni_sp.errors import ConfigError
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL, shapes_folder
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.engine.processes import becomes_true, descendants
from tests.one_rank import by_one_rank
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import draw_sharded, expected_output
from tests.thorough import THOROUGH

PROMPT = "a red circle on a blue background"
# Pictures and videos, from nothing and from pictures; OMNI_SP_THOROUGH=1 tries every pipeline.
SOME = ("QwenImageImg2ImgPipeline", "FluxImg2ImgPipeline", "WanImageToVideoPipeline", "StableAudioPipeline")
NAMES = [name for name, entry in ENTRIES.items() if entry.runs_here and (THOROUGH or name in SOME)]


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_that_of_one_process(ranks: RankPool, name: str) -> None:
    expected = expected_output(ranks, name)
    for shared, restored, _ in ranks.run(
        draw_sharded, name, torch.float32, expected, ulysses=2, ring=2, vae_parallel=True
    ):
        assert relative_error(shared, expected) <= ENTRIES[name].error
        assert restored


def demo() -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(shapes_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **call: Any) -> Any:
    arguments = {"prompt": PROMPT, **SHAPES_CALL, "num_inference_steps": 3, **call}
    return np.asarray(pipe(**arguments, generator=torch.Generator().manual_seed(11)).images[0], dtype=np.int16)


def draw_demo(mesh: ParallelMesh) -> tuple[Any, Any, int, dict[str, int], bool]:
    """The picture of one process, that of the ranks, how many of them decoded, and what they gathered."""
    pipe = demo()
    alone, small = by_one_rank(mesh, lambda: drawn(pipe)), drawn(pipe, height=64, width=80)
    handle = parallelize(pipe, mesh)
    shared, num_ranks, gathers = drawn(pipe), handle.vaes.num_ranks, handle.gathers
    handle.remove()
    restored = bool((drawn(pipe, height=64, width=80) == small).all()) and "decode" not in vars(pipe.vae)
    return alone, shared, num_ranks, gathers, restored


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 3), (2, 2), *([(2, 1)] if THOROUGH else [])], ids=str)
def test_the_demo_model_draws_the_picture_of_one_process(ranks: RankPool, ulysses: int, ring: int) -> None:
    for alone, shared, num_ranks, gathers, restored in ranks.run(
        draw_demo, ulysses=ulysses, ring=ring, vae_parallel=True
    ):
        assert np.abs(shared - alone).max() <= 2
        assert num_ranks == ulysses * ring
        assert gathers.keys() <= {"attention"}
        assert restored


def expectations(mesh: ParallelMesh) -> dict[str, Any]:
    """Which calls may be shared, and which are."""
    pipe = demo()
    handle = parallelize(pipe, mesh)
    sizes: dict[str, dict[str, Any]] = {
        "small": {"height": 256, "width": 320},
        "large": {"height": 256, "width": 1024},
        "the pipeline's own": {"height": None, "prompt": "a star"},
    }
    found: dict[str, Any] = {name: handle.vaes.are_expected(sizes[name]) for name in sizes}
    found["alone"] = None
    for name, side in {"small": 8, "large": 128}.items():
        with torch.no_grad():
            handle.reset_counts()
            pipe.vae.decode(torch.zeros(1, pipe.vae.config.z_dim, 1, 4, side))
            found[f"{name} decoded by"] = handle.vaes.num_ranks
    with torch.no_grad(), handle.vaes.alone():
        handle.reset_counts()
        if mesh.rank == 0:
            pipe.vae.decode(torch.zeros(1, pipe.vae.config.z_dim, 1, 4, 128))
        found["alone"] = handle.vaes.num_ranks
    return found


@pytest.mark.parametrize("mode", ["auto", True, False])
def test_which_calls_are_shared(ranks: RankPool, mode: Any) -> None:
    for found in ranks.run(expectations, ulysses=2, vae_parallel=mode):
        assert [found[name] for name in ("small", "large", "the pipeline's own")] == {
            "auto": [False, True, True],
            True: [True] * 3,
            False: [False] * 3,
        }[mode]
        by = [found[f"{name} decoded by"] for name in ("small", "large")]
        assert by == {"auto": [1, 2], True: [2, 2], False: [1, 1]}[mode]
        assert found["alone"] == 1


def test_other_values_are_refused() -> None:
    for value in ("yes", 1, None):
        with pytest.raises(ConfigError, match=r'vae_parallel=.*: give True, False or "auto"'):
            DiffusionParallelConfig(vae_parallel=value)  # type: ignore[arg-type]


def test_omni_draws_the_picture_of_one_process() -> None:
    before = descendants()
    params = OmniDiffusionSamplingParams(height=64, width=80, num_inference_steps=3, seed=7)
    wide = replace(params, width=1024, num_inference_steps=1)
    with Omni(SHAPES_MODEL, device="cpu") as one:
        alone, alone_wide = one.generate(PROMPT, params)[0], one.generate(PROMPT, wide)[0]
    assert alone.metrics["vae_ranks"] == 1
    with Omni(SHAPES_MODEL, DiffusionParallelConfig(ulysses_degree=2, vae_parallel=True), device="cpu") as two:
        shared = two.generate(PROMPT, params)[0]
        latents = two.generate(PROMPT, replace(params, output_type="latent"))[0]
    assert latents.metrics["vae_ranks"] == 1
    # Rank 1 reads the VAE when the first large picture comes.
    with Omni(SHAPES_MODEL, DiffusionParallelConfig(ring_degree=2), device="cpu") as two:
        assert two.generate(PROMPT, params)[0].metrics["vae_ranks"] == 1
        shared_wide = two.generate(PROMPT, wide)[0]
    for found, wanted in ((shared, alone), (shared_wide, alone_wide)):
        assert found.metrics["vae_ranks"] == 2
        pixels = [np.asarray(output.images[0], dtype=np.int16) for output in (found, wanted)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2
    assert becomes_true(lambda: descendants() <= before, 5.0)
