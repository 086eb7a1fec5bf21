"""Random programs on sharded tensors against the same programs on full tensors, on two and three ranks.

All numbers are small integers (what is computed inexactly is rounded), so everything must be equal, not just close.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.hooks import shard_input
from omni_sp.sharding.plan import Split
from omni_sp.sharding.tracked import TokenTensor, even_placement, local_shard, to_full_tensors
from omni_sp.sharding.tracked.placement import concatenated
from omni_sp.testing.ranks import RankPool
from tests.sharding.operations import OPS, WRITE, Op
from tests.thorough import THOROUGH

Step = tuple[str, int, int, int, int]
"""An operation, the numbers of two tensors, and two numbers for it to use as it likes."""
SLOTS = 12
EXTRA = 5
"""The last slots take what the operations give."""


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


def sharded(mesh: ParallelMesh, x: Tensor, dim: int, *lengths: int) -> TokenTensor:
    """A sharded tensor. Several lengths: tensors that are concatenated, each sharded evenly."""
    placement = concatenated(tuple(even_placement(length, mesh.sequence.size) for length in lengths or (x.shape[dim],)))
    return TokenTensor(local_shard(x, dim, placement, mesh.sequence).clone(), dim, placement, mesh.sequence)


def tensors(mesh: ParallelMesh) -> tuple[list[Tensor], list[Tensor]]:
    """What a program starts with: full, and with most of it sharded."""
    shapes = [(2, 7, 4), (2, 7, 4), (2, 7, 4), (7, 4), (2, 7, 1), (4,), (2, 1, 4), (3, 2, 5, 4), (4, 7), (2, 7, 4)]
    plain = [integers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    shard_dims = {0: (1,), 1: (1, 3, 4), 3: (0,), 4: (1,), 6: (1,), 7: (2,), 8: (1,)}
    tracked = [sharded(mesh, x, *shard_dims[i]) if i in shard_dims else x.clone() for i, x in enumerate(plain)]
    plain += [plain[3][2:5], plain[7].transpose(1, 2)]
    tracked += [tracked[3][2:5], tracked[7].transpose(1, 2)]
    assert len(plain) == SLOTS
    return plain, tracked


def differ(plain: Tensor, tracked: Tensor) -> str | None:
    """What is not the same about a tensor and its sharded counterpart. A collective call."""
    if (plain.shape, plain.dtype) != (tracked.shape, tracked.dtype):
        return f"{tracked.dtype} {tuple(tracked.shape)} for {plain.dtype} {tuple(plain.shape)}"
    full = to_full_tensors(tracked)
    if full.shape != plain.shape:
        return f"shards that make {tuple(full.shape)} for {tuple(plain.shape)}"
    if torch.equal(full, plain) or torch.allclose(full, plain, rtol=0, atol=0, equal_nan=True):
        return None
    return f"wrong numbers: {int((full != plain).sum())} of {plain.numel()}"


def mode(inference: bool) -> AbstractContextManager[Any]:
    return torch.inference_mode() if inference else torch.no_grad()


def run_program(mesh: ParallelMesh, program: list[Step], inference: bool) -> tuple[list[str], list[str]]:
    """On one rank: what went wrong, and what was refused (and left undone on both sides)."""
    warnings.simplefilter("ignore")
    with mode(inference):
        return _run(program, *tensors(mesh))


def _first_that_fits(op: Op, plain: list[Tensor], a: int, b: int, p: int, q: int) -> tuple[Any, int]:
    """What one process gets, and the number of the second tensor: the first from ``b`` on that goes with the first."""
    for other in [*range(b, SLOTS), *range(b)]:
        try:
            return op(plain[a], plain[other], p, q), other
        except Exception:  # shapes or dtypes that do not go together
            continue
    return None, -1


def _run(program: list[Step], plain: list[Tensor], tracked: list[Tensor]) -> tuple[list[str], list[str]]:
    refused: list[str] = []
    for number, (name, a, b, p, q) in enumerate(program):
        before = [x.clone() for x in plain]
        wanted, b = _first_that_fits(OPS[name], plain, a, b, p, q)
        if b < 0:
            continue  # torch itself does not do that
        shown = ", ".join(f"{type(x).__name__}{tuple(x.shape)}" for x in (tracked[a], tracked[b]))
        step = f"step {number}: {name}({shown}, {p}, {q})"
        try:
            got = OPS[name](tracked[a], tracked[b], p, q)
        except ShardingError:
            refused.append(name)
            for x, old in zip(plain, before, strict=True):
                if 0 not in x.stride():
                    x.copy_(old)
            wanted = got = None
        except Exception as error:
            return [f"{step} raised {error!r}"], refused
        if isinstance(wanted, (tuple, list)):
            if len(wanted) != len(got):
                return [f"{step} gave {len(got)} for {len(wanted)}"], refused
            wanted, got = (list(result)[q % len(wanted)] if wanted else None for result in (wanted, got))
        pairs = [*zip(plain, tracked, strict=True)] if name in WRITE else []
        if isinstance(wanted, Tensor):
            pairs.append((wanted, got))
        for slot, (x, y) in enumerate(pairs):
            try:
                trouble = differ(x, y)
            except ShardingError:
                # A view of what has been written to since: reading it is refused.
                refused.append("reading")
                if slot < SLOTS:
                    plain[slot], tracked[slot] = plain[5].clone(), tracked[5].clone()
                continue
            if trouble:
                return [
                    f"{step}: {trouble} in {'its result' if slot >= SLOTS or not pairs else f'slot {slot}'}"
                ], refused
        if isinstance(wanted, Tensor) and 0 < wanted.numel() <= 600 and 0 < wanted.ndim < 5 and not wanted.is_complex():
            slot = SLOTS - 1 - (a + b + p + q) % EXTRA
            plain[slot], tracked[slot] = wanted, got
    for x, y in zip(plain, tracked, strict=True):
        try:
            trouble = differ(x, y)
        except ShardingError:
            continue
        if trouble:
            return [f"at the end: {trouble}"], refused
    return [], refused


programs = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), *[st.integers(0, SLOTS - 1)] * 2, st.integers(0, 7), st.integers(0, 7)),
    min_size=40,
    max_size=120,
)


@pytest.mark.parametrize("num_ranks", [2, 3])
@settings(
    max_examples=9,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # the message of a failure already names the step
    suppress_health_check=list(HealthCheck),
)
@given(program=programs, inference=st.booleans())
def test_any_program_gives_what_it_gives_on_full_tensors(
    ranks: RankPool, num_ranks: int, program: list[Step], inference: bool
) -> None:
    answers = ranks.run(run_program, program, inference, ulysses=num_ranks)
    assert answers == [([], answers[0][1])] * num_ranks


def run_alone(mesh: ParallelMesh, inference: bool) -> tuple[dict[str, list[str]], set[str]]:
    """Every operation by itself on fresh tensors: what went wrong, and which were refused."""
    warnings.simplefilter("ignore")
    troubles: dict[str, list[str]] = {}
    all_refused: set[str] = set()
    with mode(inference):
        for name in OPS:
            for a, p, q in ((0, 2, 1), (3, 0, 4), (7, 2, 2)):
                found, refused = _run([(name, a, (a + q) % SLOTS, p, q)], *tensors(mesh))
                all_refused |= set(refused)
                if found:
                    troubles.setdefault(name, []).extend(found)
    return troubles, all_refused


@pytest.mark.parametrize(("num_ranks", "inference"), [(2, True), *([(3, False)] if THOROUGH else [])])
def test_every_operation_alone(ranks: RankPool, num_ranks: int, inference: bool) -> None:
    # Nothing that a model may do is refused, except to turn a tensor in place.
    assert ranks.run(run_alone, inference, ulysses=num_ranks) == [({}, {"transpose_"})] * num_ranks


def exchange_data(x: Tensor) -> None:
    x.data = torch.zeros(x.shape)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "data": exchange_data,
    "transpose_": lambda x: x.transpose_(0, 2),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x.squeeze_(),
    "t_ of a view": lambda x: x[:, 0].t_(),
    "resize_": lambda x: x.resize_(2, 2),
    "reading what is stale": lambda x: [row := x[:, 2], x.add_(1), row.sum()],
}


def run_refused(mesh: ParallelMesh) -> dict[str, str]:
    """What was not refused, or spoiled the tensor."""
    troubles = {}
    with torch.no_grad():
        for name, function in REFUSED.items():
            x = integers(2, 7, 4, seed=1)
            tracked = sharded(mesh, x, 1)
            try:
                function(tracked)
            except ShardingError:
                trouble = differ(x + 1 if "stale" in name else x, tracked)
            else:
                trouble = "was not refused"
            if trouble:
                troubles[name] = trouble
    return troubles


def test_what_cannot_be_done_to_shards_is_refused(ranks: RankPool) -> None:
    assert ranks.run(run_refused, ulysses=2) == [{}, {}]


def run_sharding(mesh: ParallelMesh) -> None:
    """How the tensors that a plan names are sharded."""
    x = integers(2, 7, 4, seed=1)
    seen: list[tuple[str, int]] = []

    def on_shard(location: str, full: Tensor, num_tokens: int) -> None:
        seen.append((location, num_tokens))

    def shard_as(value: Any, split: Split) -> Any:
        return shard_input(value, split, mesh, "here", on_shard, tracks=True)

    own = even_placement(7, mesh.sequence.size).lengths[mesh.sequence.rank]
    tracked = shard_as(x, Split(dim=-2, ndim=3))
    assert seen == [("here", 7)]
    assert (tracked.shard_dim, tracked.shape, tracked.local.shape) == (1, x.shape, (2, own, 4))
    assert differ(x, tracked) is None
    assert shard_as(tracked, Split(dim=0)) is tracked
    assert shard_as(None, Split(dim=1)) is None
    assert shard_as(x, Split(dim=1, ndim=4)) is x
    turned = shard_as(x.transpose(0, 1), Split(dim=0))
    assert differ(x.transpose(0, 1), turned) is None
    assert differ(x.transpose(0, 1).reshape(-1), turned.reshape(-1)) is None
    nothing, two = shard_as([None, (x, x)], Split(dim=1))
    assert nothing is None
    assert [differ(x, y) for y in two] == [None, None]
    tracked.add_(1)
    two[0].zero_()
    assert torch.equal(x, integers(2, 7, 4, seed=1))
    made = to_full_tensors({"a": [tracked, x], "b": (tracked[:, 3], 1)})
    assert type(made["a"][0]) is type(made["b"][0]) is Tensor
    assert torch.equal(made["a"][0], x + 1)
    assert torch.equal(made["b"][0], x[:, 3] + 1)
    assert made["a"][1] is x


def test_sharding_and_gathering(ranks: RankPool) -> None:
    # What it asserts, it asserts on every rank; a failure there raises here.
    assert len(ranks.run(run_sharding, ulysses=3)) == 3
