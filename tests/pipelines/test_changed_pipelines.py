"""Pipelines that people change, before or after parallelize(): LoRA weights, a step cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.library_versions import caches_after_a_call
from tests.pipelines.zoo.check import draw


def quiet(build: Any) -> Any:
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lora_weights() -> dict[str, torch.Tensor]:
    """A LoRA for the tiny FLUX as trainers save it."""
    from tests.pipelines.zoo.qwen_flux_wan import flux_pipeline

    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, module in flux_pipeline().transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            for part, shape in (("lora_A", (2, module.in_features)), ("lora_B", (module.out_features, 2))):
                weights[f"transformer.{name}.{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return weights


def with_lora(mesh: ParallelMesh, before: bool) -> tuple[float, float, float, float, bool]:
    """Errors with the LoRA, with half of it, without it again; its effect; whether remove() gives back the bits."""
    from tests.pipelines.zoo.qwen_flux_wan import flux_arguments, flux_pipeline

    warnings.simplefilter("ignore")
    alone, pipe = quiet(flux_pipeline), quiet(flux_pipeline)
    plain = draw(alone, flux_arguments())
    alone.load_lora_weights(lora_weights(), adapter_name="style")
    wanted = draw(alone, flux_arguments())
    alone.set_adapters("style", 0.5)
    half = draw(alone, flux_arguments())
    if before:
        pipe.load_lora_weights(lora_weights(), adapter_name="style")
    handle = parallelize(pipe, mesh)
    if not before:
        draw(pipe, flux_arguments())
        pipe.load_lora_weights(lora_weights(), adapter_name="style")
    error = relative_error(draw(pipe, flux_arguments()), wanted)
    pipe.set_adapters("style", 0.5)
    error_of_half = relative_error(draw(pipe, flux_arguments()), half)
    pipe.unload_lora_weights()
    error_without = relative_error(draw(pipe, flux_arguments()), plain)
    handle.remove()
    restored = torch.equal(draw(pipe, flux_arguments()), plain)
    return error, error_of_half, error_without, relative_error(plain, wanted), restored


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_lora_weights_come_and_go(ranks: RankPool, before: bool) -> None:
    for error, half, without, effect, restored in ranks.run(with_lora, before, ulysses=2, ring=2):
        assert effect > 1e-3
        assert max(error, half, without) <= 1e-5
        assert restored


def with_step_cache(mesh: ParallelMesh, before: bool) -> tuple[float, float, list[int], list[int]]:
    """Error, effect of the cache, and how often each block's first norm ran, over ranks and alone."""
    from diffusers import FirstBlockCacheConfig

    from tests.pipelines.zoo.qwen_flux_wan import qwen_arguments, qwen_pipeline

    warnings.simplefilter("ignore")
    arguments = {**qwen_arguments(), "num_inference_steps": 8}
    alone, pipe = quiet(qwen_pipeline), quiet(qwen_pipeline)
    plain = draw(alone, arguments)
    runs: dict[str, list[int]] = {}
    results = {}
    handle = None
    for name, one in (("alone", alone), ("ranks", pipe)):
        if name == "ranks" and not before:
            handle = parallelize(pipe, mesh)
            draw(pipe, arguments)
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
        if name == "ranks" and before:
            handle = parallelize(pipe, mesh)
        counts = runs[name] = [0] * len(one.transformer.transformer_blocks)
        for index, block in enumerate(one.transformer.transformer_blocks):

            def count(*_: Any, counts: list[int] = counts, index: int = index) -> None:
                counts[index] += 1

            block.img_norm1.register_forward_hook(count)
        results[name] = draw(one, arguments)
    assert handle is not None
    handle.remove()
    wanted = results["alone"]
    return relative_error(results["ranks"], wanted), relative_error(plain, wanted), runs["ranks"], runs["alone"]


@caches_after_a_call
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_step_cache_under_guidance(ranks: RankPool, before: bool) -> None:
    for error, effect, runs, wanted in ranks.run(with_step_cache, before, ulysses=3):
        assert runs == wanted
        assert wanted[1] < wanted[0]
        assert effect > 1e-4
        assert error <= 1e-5
