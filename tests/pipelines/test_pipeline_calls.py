"""Pipelines that share a transformer or a scheduler: each draws what it draws alone, and a rank may read alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from omni_sp import ParallelMesh, parallelize
from omni_sp.pipelines.pipeline_calls import calling_pipeline
from omni_sp.testing.ranks import RankPool
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import build
from tests.thorough import thorough_only

QWEN = "QwenImagePipeline"


def sharing(mesh: ParallelMesh) -> dict[str, Any]:
    """A pipeline with the transformer of a parallelized one and a scheduler of its own; then both parallelized."""
    pipe, arguments = build(QWEN, torch.float32), ENTRIES[QWEN].arguments()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"read": [], "kinds": set()}

    def callback(caller: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        found["kinds"].add(type(given["latents"]))
        if mesh.rank == 0:  # alone
            found["read"].append(float(given["latents"].sum()))
        return given

    def drawn(one: Any) -> Any:
        call = {**arguments, "num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": callback}
        result = one(**call, generator=torch.Generator().manual_seed(7)).images
        found["kinds"].add(type(result))
        return torch.as_tensor(result)

    expected = drawn(other)
    handle = parallelize(pipe, mesh)
    assert handle.branches is not None
    found["equal"] = [torch.equal(drawn(one), expected) for one in (pipe, other, pipe, other)]
    handle.reset_counts()
    found["equal"].append(torch.equal(drawn(other), expected))
    found["counts"] = [handle.branches.counts.steps, handle.branches.counts.units, handle.branches.counts.rounds]
    handle.remove()
    found["left"] = [name for one in (pipe, other) for name in vars(one) if name == "maybe_free_model_hooks"]
    found["left"] += [name for one in (pipe, other) for name in vars(one.scheduler) if name == "step"]
    return found


def test_a_pipeline_that_shares_the_transformer(ranks: RankPool) -> None:
    for found in ranks.run(sharing, cfg=2, vae_parallel=False):
        assert found["equal"] == [True] * 5
        assert found["kinds"] == {torch.Tensor}
        assert found["counts"] == [3, 6, 3]
        assert found["left"] == []


def sharing_a_scheduler(mesh: ParallelMesh) -> tuple[list[Any], list[str]]:
    """Two parallelized pipelines with one scheduler: the counts of each, and what is left on it after both."""
    pipe, arguments = build(QWEN, torch.float32), ENTRIES[QWEN].arguments()
    build.cache_clear()
    other = build(QWEN, torch.float32)
    other.scheduler = pipe.scheduler
    call = {**arguments, "num_inference_steps": 3, "output_type": "latent"}
    handles, counts = [parallelize(one, mesh) for one in (pipe, other)], []
    for _ in range(2):
        for one, handle in zip((pipe, other), handles, strict=True):
            handle.reset_counts()
            one(**call, generator=torch.Generator().manual_seed(7))
            assert handle.branches is not None
            counts.append([handle.branches.counts.steps, handle.branches.counts.units, handle.branches.counts.rounds])
    handles[0].remove()
    watched = "step" in vars(other.scheduler)
    handles[1].remove()
    return counts[2:], [str(watched), *(name for name in vars(pipe.scheduler) if name == "step")]


@thorough_only
def test_two_parallelized_pipelines_with_one_scheduler(ranks: RankPool) -> None:
    for counts, left in ranks.run(sharing_a_scheduler, cfg=2, vae_parallel=False):
        assert counts == [[3, 6, 3]] * 2
        assert left == ["True"]


def test_the_innermost_pipeline_calls() -> None:
    class Other:
        """Has a name in common with pipelines."""

        components: tuple[Any, ...] = ()

        def __call__(self) -> Any:
            return calling_pipeline()

    class Pipe(Other):
        def maybe_free_model_hooks(self) -> None:
            """As pipelines have it."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __call__(self) -> Any:
            return self._inner()

    inner = Pipe(Other())
    assert Pipe(inner)() is inner
    assert calling_pipeline() is None
