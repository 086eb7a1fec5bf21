"""Whole pictures: every published figure stands beside its layout, and more GPUs are never slower."""

from __future__ import annotations

import pytest

from benchmarks.whole_pictures import as_table, machine_for, project
from omni_sp.planner import ModelCost, Size

WAN = ModelCost(
    "Wan2.2-T2V-A14B", Size(720, 1280, 81), 75600, 40, 128, 40, 2.1e15, 4.7e15, 14.3e9,
    transformers=2, block_elements=2e9, branches=2, steps=40, encoder_parameters=5.7e9, vae_flops=6e14,
    vae_parameters=0.127e9, vae_elements=1.4e9,
)  # fmt: skip


def test_the_published_run_on_one_gpu_is_the_base() -> None:
    on, source = machine_for(WAN, "gb200")
    found = project(WAN, on, 8)
    assert found[0].estimate.seconds == pytest.approx(348.4)
    assert "TensorRT-LLM" in source
    published = {str(one.estimate.degrees): list(one.published.values()) for one in found}
    assert published["cfg 2 x ulysses 4"] == published["cfg 2 x ulysses 4, VAE on all"] == [48.1]
    assert published["ulysses 4"] == []
    quickest = min(found, key=lambda one: one.estimate.seconds)
    assert str(quickest.estimate.degrees) == "cfg 2 x ulysses 4, VAE on all"
    assert as_table(WAN, on, source, found).count("\n") == len(found) + 1 == 14


def test_a_measured_forward_gives_the_efficiency_and_weights_are_sharded_where_they_must() -> None:
    on, source = machine_for(WAN, "L20", 500.0)
    assert source == "of a forward measured here, 500 s"
    found = project(WAN, on, 4)
    assert found[0].estimate.seconds == pytest.approx(40 * 2 * 500.0, rel=0.02)
    assert all(one.estimate.degrees.shard_weights == (one.estimate.degrees.sequence > 1) for one in found)
    assert machine_for(WAN, "A100")[1] == "assumed"
