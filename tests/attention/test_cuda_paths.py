"""The core on fake CUDA tensors: the kernels that are chosen and called, and the shapes of what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_sp.attention import WholeKeyMask, local_attention, sequence_parallel_attention
from omni_sp.attention.kernels import registry
from omni_sp.attention.layout import SequenceLayout
from tests.fake_cuda import FakeCuda, fake_mesh
from tests.thorough import THOROUGH

BF16, FP32 = torch.bfloat16, torch.float32
FLASH, CUDNN, EFFICIENT = (f"aten::_scaled_dot_product_{name}_attention" for name in ("flash", "cudnn", "efficient"))


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operators of attention that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "attention" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def tokens(length: int, heads: int, dtype: torch.dtype, head_dim: int = 128) -> torch.Tensor:
    return torch.empty(1, length, heads, head_dim, device="cuda", dtype=dtype)


@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        ("auto", BF16, FLASH),
        ("auto", torch.float16, FLASH),
        ("auto", FP32, EFFICIENT),
        ("cuda_flash", BF16, FLASH),
        ("cuda_cudnn", BF16, CUDNN),
        ("cuda_efficient", BF16, EFFICIENT),
        ("cuda_efficient", FP32, EFFICIENT),
        ("math", BF16, None),
        ("auto", torch.float64, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_kernel_gives_its_output_for_its_own_operator(
    fake_cuda: FakeCuda, kernel: str, dtype: torch.dtype, expected: str | None, is_causal: bool
) -> None:
    with fake_cuda, Called() as called:
        query, key = tokens(1000, 24, dtype), tokens(1000, 8, dtype)
        out = local_attention(query, key, key, kernel=kernel, is_causal=is_causal)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, dtype, "cuda")
    assert called.names == ([] if expected is None else [expected])
    assert not fake_cuda.waits


LAYOUTS = [(8, 1), (1, 4), (2, 2), (4, 2), (5, 1)]
CASES: dict[str, dict[str, Any]] = {
    "even": {},
    "uneven": {"lengths": lambda rank: 1000 - rank % 3},
    "ranks without tokens": {"lengths": lambda rank: 1000 if rank == 0 else 0},
    "grouped heads": {"kv_heads": 8},
    "one head of keys": {"kv_heads": 1},
    "fp32": {"dtype": FP32},
    "cuDNN": {"kernel": "cuda_cudnn"},
    "memory-efficient": {"kernel": "cuda_efficient"},
    "math": {"kernel": "math"},
    "head groups": {"head_groups": 3},
    "keys gathered": {"gather_keys": True},
    "keys passed on": {"gather_keys": False},
}


RUNS = [
    (case, layout) for case in CASES for layout in LAYOUTS if THOROUGH or layout in ((2, 2), (5, 1)) or case == "uneven"
]


@pytest.mark.parametrize(("case", "layout"), RUNS, ids=str)
def test_attention_over_ranks_without_waiting_for_the_device(
    fake_cuda: FakeCuda, case: str, layout: tuple[int, int]
) -> None:
    ulysses, ring = layout
    options: dict[str, Any] = {"lengths": lambda _rank: 1000, "kv_heads": 24, "dtype": BF16, **CASES[case]}
    lengths = tuple(options["lengths"](rank) for rank in range(ulysses * ring))
    with fake_mesh(ulysses, ring) as mesh, fake_cuda:
        query = tokens(lengths[0], 24, options["dtype"])
        key = tokens(lengths[0], options["kv_heads"], options["dtype"])
        arguments: dict[str, Any] = {"mesh": mesh, "layout": SequenceLayout(query=lengths, key=lengths)}
        arguments |= {name: options[name] for name in ("kernel", "head_groups", "gather_keys") if name in options}
        sequence_parallel_attention(query, key, key, **arguments)
        fake_cuda.waits.clear()  # what is made once for a layout
        out = sequence_parallel_attention(query, key, key, **arguments)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "cuda")
    assert not fake_cuda.waits


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_a_mask_of_keys(fake_cuda: FakeCuda, ulysses: int, ring: int) -> None:
    """A mask on the device: this rank's part, as the public function takes it."""
    lengths = (1000,) * (ulysses * ring)
    with fake_mesh(ulysses, ring) as mesh, fake_cuda:
        query = tokens(1000, 24, BF16)
        mask = torch.ones(1, 1000, dtype=torch.bool, device="cuda")
        layout = SequenceLayout(query=lengths, key=lengths)
        out = sequence_parallel_attention(query, query, query, mesh=mesh, layout=layout, key_mask=mask)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, BF16, "cuda")


@pytest.mark.parametrize("capability", [None, (9, 0)], ids=str)
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_under_a_mask_that_all_ranks_know_the_fast_kernels_run(
    fake_cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    ulysses: int,
    ring: int,
    capability: tuple[int, int] | None,
) -> None:
    monkeypatch.setattr(registry, "compute_capability", lambda device: capability)
    lengths = (1000,) * (ulysses * ring)
    # The second row differs from the first, and has gaps.
    mask = torch.arange(sum(lengths)) < torch.tensor([[sum(lengths) - 500], [sum(lengths)]])
    mask[1, 3::7] = False
    whole_mask = WholeKeyMask(mask, lengths)
    with fake_mesh(ulysses, ring) as mesh, fake_cuda:
        query = tokens(1000, 24, BF16).expand(2, -1, -1, -1)
        layout = SequenceLayout(lengths, lengths)
        arguments: dict[str, Any] = {"mesh": mesh, "layout": layout, "key_mask": whole_mask}
        sequence_parallel_attention(query, query, query, **arguments)
        fake_cuda.waits.clear()  # the places of the keys that count go to the device once
        with Called() as called:
            out = sequence_parallel_attention(query, query, query, **arguments)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, BF16, "cuda")
    assert set(called.names) == {FLASH if capability is None else CUDNN}
    assert not fake_cuda.waits


def test_waiting_for_the_device_is_seen(fake_cuda: FakeCuda) -> None:
    with fake_cuda:
        x = torch.ones(3, device="cuda")
        assert not fake_cuda.waits
        x.cpu()
        torch.tensor([1, 2], device="cuda")
        x.copy_(torch.ones(3))
        assert len(fake_cuda.waits) == 3
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(RuntimeError):
            bool((x > 0).all())
    assert len(fake_cuda.waits) == 5
