"""Shapes drawn by hypothesis with pinned seeds, against float64 attention over the whole sequence."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from omni_sp.attention import local_attention
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error
from tests.attention.test_core import Case, make, run_case

DEGREES = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2)]
Drawn = tuple[Case, tuple[int, int], tuple[int | None, bool], bool]
LENGTH = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 40))


@st.composite
def cases(draw: st.DrawFn) -> Drawn:
    """An attention, the degrees, the number of head groups, how a ring brings keys, and whether memory is shared."""
    ulysses, ring = draw(st.sampled_from(DEGREES))
    num_ranks = ulysses * ring
    query = tuple(draw(st.lists(LENGTH, min_size=num_ranks, max_size=num_ranks)))
    causal = draw(st.booleans())
    same = causal or draw(st.booleans())
    key = query if same else tuple(draw(st.lists(LENGTH, min_size=num_ranks, max_size=num_ranks)))
    kv_heads = draw(st.integers(1, 5))
    case = Case(
        query=query,
        key=key,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 40, 64, 128, 256])),
        batch=draw(st.integers(1, 3)),
        masked=draw(st.booleans()),
        whole_mask=draw(st.booleans()),
        causal=causal,
        scale=draw(st.sampled_from([None, 0.05, 0.5])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
    )
    options = draw(st.sampled_from([None, None, 2, 3])), draw(st.booleans())
    return case, (ulysses, ring), options, draw(st.booleans())


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=cases())
def test_any_shape_equals_one_process(ranks: RankPool, drawn: Drawn) -> None:
    case, (ulysses, ring), options, shared_memory = drawn
    query, key, value, mask = make(case, ulysses * ring)
    wanted = attention(query, key, value, key_mask=mask, is_causal=case.causal, scale=case.scale)
    answers = ranks.run(run_case, case, True, *options, ulysses=ulysses, ring=ring, shared_memory=shared_memory)
    got = torch.cat(answers, dim=1)
    assert got.shape == query.shape
    assert got.dtype == case.dtype
    assert not got.isnan().any()
    error = relative_error(got, wanted)
    note(f"relative error {error:.2e}")
    if case.dtype == torch.float32:
        assert error <= 2e-6
    else:
        alone = ranks.run(run_alone, case, ulysses * ring)[0]
        # The error of a few numbers varies: half a unit in the last place is always allowed.
        least = torch.finfo(case.dtype).eps / 2
        assert error <= 1.5 * max(relative_error(alone, wanted), least)


def run_alone(mesh: object, case: Case, num_ranks: int) -> torch.Tensor:
    """The whole sequence on one process in its own dtype."""
    query, key, value, mask = make(case, num_ranks)
    return local_attention(query, key, value, key_mask=mask, is_causal=case.causal, scale=case.scale)
