"""Pipelines that people change, before or after parallelize(): LoRA weights, a step cache."""

from __future__ import annotations

import warnings
from itertools import permutations
from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.library_versions import caches_after_a_call
from tests.pipelines.zoo.check import draw
from tests.sharding.quantised import ScaledWeight
from tests.sharding.test_changed import add_lora
from tests.thorough import thorough_only


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


def put_on_lora(pipe: Any) -> None:
    add_lora(pipe.transformer)


def quantise(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        linear = block.img_mlp.net[2]
        linear = getattr(linear, "base_layer", linear)  # LoRA's may be around it
        linear.weight = ScaledWeight.of(linear.weight)


def cache_steps(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=5.0))


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


PARALLEL = "parallelize"
STEPS = (PARALLEL, put_on_lora, quantise, cache_steps)


def in_this_order(mesh: ParallelMesh, orders: list[tuple[Any, ...]], compile: Any) -> list[tuple[str, list[float]]]:
    """Errors after each change of a pipeline that is parallelized somewhere among them, after remove(), and again."""
    from tests.pipelines.zoo.qwen_flux_wan import qwen_arguments, qwen_pipeline

    warnings.simplefilter("ignore")
    arguments, found = {**qwen_arguments(), "num_inference_steps": 2, "output_type": "latent"}, []
    for order in orders:
        alone, pipe = quiet(qwen_pipeline), quiet(qwen_pipeline)
        handle, errors = None, []
        for change in order:
            if change == PARALLEL:
                handle = parallelize(pipe, mesh, compile=compile)
            else:
                for one in (alone, pipe):
                    change(one)
            if handle is not None:
                wanted = draw(alone, arguments)
                errors += [relative_error(draw(pipe, arguments), wanted) for _ in range(2)]
        assert handle is not None
        handle.remove()
        errors.append(relative_error(draw(pipe, arguments), wanted))
        handle = parallelize(pipe, mesh)
        errors.append(relative_error(draw(pipe, arguments), wanted))
        handle.remove()
        torch.compiler.reset()
        names = [change if change == PARALLEL else change.__name__ for change in order]
        found.append((", ".join(names), errors))
    return found


@thorough_only
@caches_after_a_call
@pytest.mark.parametrize(
    ("last", "compile", "layout"),
    [
        (cache_steps, False, {"cfg": 2, "ulysses": 2, "shard_weights": True}),
        (cache_steps, {"backend": "eager"}, {"ring": 2, "shard_weights": True}),
        (offload, False, {"cfg": 2, "ulysses": 2}),
    ],
    ids=["sharded, cfg 2 x ulysses 2", "sharded and compiled, ring 2", "offloaded, cfg 2 x ulysses 2"],
)
@pytest.mark.parametrize("first", STEPS, ids=lambda step: getattr(step, "__name__", step))
def test_changes_in_any_order(ranks: RankPool, first: Any, last: Any, compile: Any, layout: dict[str, Any]) -> None:
    # On a CPU offloading moves nothing, and leaves accelerate's hooks around each part of the pipeline.
    steps = [last if step is cache_steps else step for step in STEPS]
    orders = [order for order in permutations(steps) if order[0] is steps[STEPS.index(first)]]
    for answers in ranks.run(in_this_order, orders, compile, **layout):
        for names, errors in answers:
            assert max(errors) <= 1e-5, names
