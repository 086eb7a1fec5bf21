"""What a call of the core asks of the device, counted: on a GPU each copy is a kernel, and each transfer a wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from omni_sp.attention import SequenceLayout, sequence_parallel_attention
from omni_sp.attention.layout import head_runs, head_shares
from tests.attention.test_core import Case, make
from tests.fake_cuda import fake_mesh

MOST_OPERATIONS = 20
"""With evenly split shares along one axis, the kernel's own included. On both axes it is ten more."""


class Operations(TorchDispatchMode):
    """Counts aten's operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(case: Case, ulysses: int, ring: int) -> Counter[str]:
    """The operations of rank 0 in the second call of an attention, on the path that a GPU's library takes."""
    layout = SequenceLayout(case.query[: ulysses * ring], case.key[: ulysses * ring])
    query, key, value, mask = make(case, 1)
    operations = Operations()
    with fake_mesh(ulysses, ring) as mesh:
        for _ in range(2):
            operations.counts.clear()
            with operations:
                sequence_parallel_attention(
                    query, key, value, mesh=mesh, layout=layout, key_mask=mask, is_causal=case.causal
                )
    return operations.counts


EVEN = Case((8,) * 4, (8,) * 4, heads=8, kv_heads=8)
OTHERS = {
    "uneven tokens": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=8, kv_heads=8),
    "uneven heads": Case((8,) * 4, (8,) * 4, heads=5, kv_heads=5),
    "grouped heads": Case((8,) * 4, (8,) * 4, heads=8, kv_heads=4),
    "grouped heads, uneven": Case((8,) * 4, (8,) * 4, heads=9, kv_heads=3),
    "masked": Case((8,) * 4, (8,) * 4, heads=8, kv_heads=8, masked=True),
    "both uneven": Case((9, 8, 8, 7), (9, 8, 8, 7), heads=6, kv_heads=6),
}


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (4, 1), (2, 2)], ids=lambda degree: str(degree))
def test_a_call_is_few_operations(ulysses: int, ring: int) -> None:
    most = MOST_OPERATIONS if ulysses == 1 or ring == 1 else MOST_OPERATIONS + 10
    assert count(EVEN, ulysses, ring).total() <= most
    others = {name: count(case, ulysses, ring).total() for name, case in OTHERS.items()}
    assert max(others.values()) <= 2 * most, others


def test_even_shares_are_packed_by_one_copy() -> None:
    operations = count(EVEN, 4, 1)
    copies = {
        name: n for name, n in operations.items() if name in ("cat", "copy_", "clone", "_to_copy", "index_select")
    }
    assert copies == {"cat": 1, "copy_": 1}, "query, key and value in one copy, the output in another"


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True)])
def test_nothing_is_made_from_numbers(masked: bool, causal: bool) -> None:
    """A tensor of Python's numbers would cross to the device in every call, and a number read from one waits for it."""
    operations = count(Case((9, 8, 8, 7), (9, 8, 8, 7), heads=9, kv_heads=3, masked=masked, causal=causal), 2, 2)
    assert not {"lift_fresh", "arange", "scalar_tensor", "_local_scalar_dense", "nonzero"} & operations.keys()


def test_evenly_split_heads_are_one_run() -> None:
    def runs(heads: int, kv_heads: int, degree: int) -> list[tuple[int, int]]:
        shares = head_shares(heads, kv_heads, degree)[0]
        found = head_runs([(share.query, share.key) for share in shares])
        for run in found:
            for index, share in enumerate(shares[run.start : run.start + run.num_ranks]):
                heads_of_rank = [(first + index * step, count) for first, step, count in run.heads]
                assert heads_of_rank == [(start, stop - start) for start, stop in (share.query, share.key)]
        return [(run.start, run.num_ranks) for run in found]

    assert runs(8, 8, 4) == [(0, 4)]
    assert runs(8, 4, 4) == [(0, 4)]
    assert runs(6, 6, 4) == [(0, 2), (2, 2)]
    assert runs(8, 2, 4) == [(0, 2), (2, 2)]
    assert runs(1, 1, 3) == [(0, 1), (1, 2)]
    assert runs(7, 1, 4) == [(0, 3), (3, 1)]
