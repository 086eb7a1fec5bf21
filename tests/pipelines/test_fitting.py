"""Quantised weights, parts on the CPU, and a VAE in another dtype: over ranks as in one process, or refused by name."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_sp import ConfigError, DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.errors import OmniSPError
from omni_sp.pipelines import fitting
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL
from omni_sp.requests import engine_options
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.library_versions import OFFLOADS_GROUPS_ON_CPU

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
OPTIONS: list[dict[str, str]] = [
    {"offload": "model"},
    {"vae_dtype": "bfloat16"},
    *([{"offload": "group"}] if OFFLOADS_GROUPS_ON_CPU else []),
    *([{"quantization": "int8"}, {"quantization": "fp8", "offload": "model"}] if HAS_TORCHAO else []),
]
CALL = {**SHAPES_CALL, "height": 80, "width": 48, "num_inference_steps": 3}


def draw(pipe: Any, output_type: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipe("a red circle", **CALL, output_type=output_type, generator=generator).images).float()


def alone_and_together(mesh: ParallelMesh, options: dict[str, str]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    pipe = load_pipeline(resolve_model(SHAPES_MODEL), **options)  # type: ignore[arg-type]
    kinds = ("latent", "pt")
    wanted = [draw(pipe, kind) for kind in kinds]
    handle = parallelize(pipe, mesh)
    got = [draw(pipe, kind) for kind in kinds]
    blocks, vaes = handle.blocks.as_dict(), handle.vaes.num_ranks
    handle.remove()
    return {
        "errors": [relative_error(x, y) for x, y in zip(got, wanted, strict=True)],
        "restored": torch.equal(draw(pipe, "pt"), wanted[1]),
        "blocks": blocks,
        "vae_ranks": vaes,
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ranks_draw_what_one_process_draws(ranks: RankPool, options: dict[str, str]) -> None:
    degrees = {"ring": 2} if "quantization" in options else {"cfg": 2} if "vae_dtype" in options else {"ulysses": 2}
    for found in ranks.run(alone_and_together, options, **degrees, vae_parallel=True):
        assert found["errors"][0] <= 1e-5
        assert found["errors"][1] <= (2e-2 if "vae_dtype" in options else 1e-5)
        assert found["restored"]
        assert found["vae_ranks"] == 2
        moves = "group offloading moves its weights"
        assert set(found["blocks"]["followed"]) <= ({moves} if options.get("offload") == "group" else set())
