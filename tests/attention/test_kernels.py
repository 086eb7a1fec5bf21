"""A kernel of one's own, and packages that are not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from omni_sp import DiffusionParallelConfig, ParallelMesh, UnsupportedAttentionError
from omni_sp.attention import Capabilities, Kernel, kernel_names, register_kernel, sequence_parallel_attention
from omni_sp.attention.kernels import AttentionArgs, KeyBlock, attend, load_kernel, registry
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error


def plain(query: Any, key: Any, value: Any, key_mask: Any, is_causal: bool, scale: float) -> Any:
    """A user's kernel, as short as one can be."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


PLAIN = Kernel("plain", Capabilities(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32})), plain)


@pytest.fixture
def registered() -> Iterator[None]:
    register_kernel(PLAIN)
    yield
    registry._REGISTERED.pop("plain")


def run_plain(mesh: ParallelMesh) -> torch.Tensor:
    if "plain" not in kernel_names():
        register_kernel(PLAIN)
    x = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(0))
    own = x.tensor_split(mesh.world_size, dim=1)[mesh.rank]
    return sequence_parallel_attention(own, own[:, :, :2], own[:, :, :2], mesh=mesh, kernel="plain")


def test_a_kernel_of_ones_own_runs_under_both_axes(ranks: RankPool) -> None:
    x = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(0))
    got = torch.cat(ranks.run(run_plain, ulysses=2, ring=2), dim=1)
    assert relative_error(got, attention(x, x[:, :, :2], x[:, :, :2])) <= 2e-6


def test_names_are_taken_once(registered: None) -> None:
    assert "plain" in kernel_names()
    with pytest.raises(UnsupportedAttentionError, match="'plain' already"):
        register_kernel(PLAIN)


def test_a_kernel_is_not_asked_for_what_it_cannot_do(registered: None) -> None:
    mesh = ParallelMesh(DiffusionParallelConfig())
    x = torch.zeros(1, 3, 4, 8)
    with pytest.raises(UnsupportedAttentionError, match="'plain' takes no key mask; able here: cpu_flash, math"):
        sequence_parallel_attention(x, x, x, mesh=mesh, kernel="plain", key_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedAttentionError, match="'plain' is not causal"):
        sequence_parallel_attention(x, x, x, mesh=mesh, kernel="plain", is_causal=True)


OPTIONAL = {
    "flash_attn_2": ("flash_attn", "flash_attn_func", {"softmax_scale", "causal", "return_attn_probs"}),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_func", {"softmax_scale", "causal", "return_attn_probs"}),
    "flash_attn_4": ("flash_attn.cute", "flash_attn_func", {"softmax_scale", "causal", "return_lse"}),
    "sage_lossy": ("sageattention", "sageattn", {"tensor_layout", "is_causal", "sm_scale", "return_lse"}),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_package_that_is_missing_is_named(name: str) -> None:
    module = OPTIONAL[name][0]
    if module.split(".")[0] in sys.modules:
        pytest.skip(f"{module} is installed here")
    x = torch.zeros(1, 3, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedAttentionError, match="needs a package that is not usable here"):
        attend(x, KeyBlock(x, x, None), AttentionArgs(load_kernel(name), scale=1.0, is_causal=False))


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_package_is_called_by_its_own_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: what we pass, and what we make of what comes back."""
    module, function, wanted = OPTIONAL[name]
    seen: dict[str, Any] = {}

    def stand_in(query: Any, key: Any, value: Any, **options: Any) -> Any:
        seen.update(options)
        return plain(query, key, value, None, False, options.get("softmax_scale") or options["sm_scale"])

    for part in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[module], function, stand_in, raising=False)
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    out, lse = attend(x, KeyBlock(x, x, None), AttentionArgs(load_kernel(name), scale=0.4, is_causal=False))
    assert set(seen) == wanted
    assert relative_error(out, attention(x, x, x, scale=0.4)) <= 2e-6
    assert lse.shape == (1, 2, 5)
