"""yunchang as a strategy: the same result where it can, a refusal where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_sp import DiffusionParallelConfig, OmniSPError, ParallelMesh, UnsupportedAttentionError, parallelize
from omni_sp.attention import SequenceLayout, select_strategy, sequence_parallel_attention
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs

pytest.importorskip("yunchang", reason="yunchang is not installed: pip install '.[yunchang]'")


def with_yunchang(mesh: ParallelMesh, heads: int, inputs: dict[str, Any]) -> float | str:
    model, arguments = randomise(qwen_image(heads)), qwen_inputs(**inputs)
    with torch.no_grad():
        wanted = model(**arguments)[0]
        try:
            handle = parallelize(model, mesh, attention_strategy="yunchang")
            got = model(**arguments)[0]
        except OmniSPError as error:
            return str(error)
        handle.remove()
    return relative_error(got, wanted)


def test_it_equals_one_process_where_it_can(ranks: RankPool) -> None:
    for error in ranks.run(with_yunchang, 4, {"height": 6, "width": 8, "text": 12, "batch": 2}, ulysses=2):
        assert isinstance(error, float)
        assert error <= 1e-5


@pytest.mark.parametrize(
    ("heads", "inputs", "ulysses", "ring", "message"),
    [
        (4, {"height": 5, "width": 7}, 2, 1, "needs the same number of tokens on every rank"),
        (3, {"height": 6, "width": 8, "text": 12}, 2, 1, "needs heads that ulysses_degree divides"),
        (4, {"height": 6, "width": 8, "text": 12, "lengths": (12, 5)}, 2, 1, "takes no mask"),
        (4, {"height": 6, "width": 8, "text": 12}, 1, 2, "gives wrong results in its plain torch ring"),
    ],
)
def test_what_it_gets_wrong_is_refused(
    ranks: RankPool, heads: int, inputs: dict[str, Any], ulysses: int, ring: int, message: str
) -> None:
    for error in ranks.run(with_yunchang, heads, inputs, ulysses=ulysses, ring=ring):
        assert isinstance(error, str)
        assert error.startswith(f"yunchang {message}")
        assert 'use attention_strategy="omni_sp"' in error


def other_refusals(mesh: ParallelMesh) -> list[str]:
    messages = []
    for name, kernel in (("yunchang", "math"), ("nonsense", "auto")):
        try:
            select_strategy(name, mesh, kernel)
        except UnsupportedAttentionError as error:
            messages.append(str(error))
    attend = select_strategy("yunchang", mesh, "auto")
    x = torch.zeros(1, 3, 4, 8)
    for key, causal, layout in (
        (x[:, :, :2], False, SequenceLayout((3, 3), (3, 3))),
        (x, True, SequenceLayout((3, 3), (3, 3))),
        (x, True, SequenceLayout((3, 3), (3, 3), front_lengths=(6,))),
        (x[:, :0], False, SequenceLayout((0, 0), (0, 0))),
    ):
        try:
            attend(x, key, key, key_mask=None, is_causal=causal, scale=None, layout=layout)
        except UnsupportedAttentionError as error:
            messages.append(str(error))
    return messages


def test_other_refusals(ranks: RankPool) -> None:
    for messages in ranks.run(other_refusals, ulysses=2):
        assert len(messages) == 6
        assert "brings its own kernels" in messages[0]
        assert "choose from omni_sp, yunchang" in messages[1]
        assert "grouped heads (4 and 2)" in messages[2]
        assert "not used for causal attention without flash-attn" in messages[3]
        assert "zigzag" in messages[4]
        assert "needs tokens on every rank" in messages[5]


def on_half_of_the_ranks(job: ParallelMesh) -> float:
    """Ranks 2 and 3 of a job attend on a mesh of their own, and ranks 0 and 1 take no part."""
    if job.rank < 2:
        return 0.0
    mesh = ParallelMesh(DiffusionParallelConfig(ulysses_degree=2), ranks=(2, 3))
    x = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(job.rank))
    layout = SequenceLayout((4, 4), (4, 4))
    got = select_strategy("yunchang", mesh, "auto")(x, x, x, key_mask=None, is_causal=False, scale=None, layout=layout)
    return relative_error(got, sequence_parallel_attention(x, x, x, mesh=mesh, layout=layout))


def test_a_mesh_of_some_ranks(ranks: RankPool) -> None:
    assert max(ranks.run(on_half_of_the_ranks, ulysses=4)) <= 2e-6
