"""Whole, unmodified diffusers pipelines under parallelize() against the same pipeline on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from tests.attention.reference import relative_error
from tests.ranks import RankPool

LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]


def draw(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Run a few steps from a fixed seed."""
    output = pipe(
        **arguments,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        return_dict=False,
    )[0]
    assert isinstance(output, torch.Tensor)
    return output.float()


def compare(mesh: ParallelMesh, name: str, dtype: torch.dtype) -> tuple[float, float, bool]:
    """Error sharded, error of this dtype itself, whether remove() gives back the very bits."""
    from tests.pipelines.tiny import PIPELINES

    build, make_arguments = PIPELINES[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    arguments = make_arguments()
    wanted = draw(pipe, arguments)
    pipe.to(dtype)
    arguments = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    alone = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    sharded = draw(pipe, arguments)
    handle.remove()
    again = draw(pipe, arguments)
    assert wanted.std() > 0.01, "a picture of one colour would prove nothing"
    return relative_error(sharded, wanted), relative_error(alone, wanted), torch.equal(again, alone)


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS, ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["qwen", "flux", "wan"])
def test_fp32_equals_one_process(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    for error, _, restored in ranks.run(compare, name, torch.float32, ulysses=ulysses, ring=ring):
        assert error <= 1e-5
        assert restored


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (3, 1)], ids=lambda degree: str(degree))
@pytest.mark.parametrize("name", ["qwen", "flux", "wan"])
def test_bf16_is_as_good_as_one_process(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    for error, own, restored in ranks.run(compare, name, torch.bfloat16, ulysses=ulysses, ring=ring):
        assert error <= 1.5 * own
        assert restored
