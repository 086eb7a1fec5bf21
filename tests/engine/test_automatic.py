"""parallel_config="auto": the planner's choice, the simple rule, and one choice for all ranks of a program."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from omni_sp import DiffusionParallelConfig, Omni, ParallelMesh
from omni_sp.engine.automatic import (
    Choice,
    Devices,
    automatic_config,
    choose_degrees,
    devices_here,
    is_automatic,
    simple_config,
)
from omni_sp.errors import ConfigError
from omni_sp.pipelines.load import ModelSource
from omni_sp.planner import ModelCost, Size, machine
from omni_sp.planner.measured import Measured, Transfer, save_measured
from omni_sp.testing.ranks import RankPool

H100 = machine("H100")


def pipeline(folder: Path, pipeline_class: str, transformer: str, **config: object) -> ModelSource:
    """The configurations of a pipeline, without weights."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": transformer, **config}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    return ModelSource(name="a model", location=str(folder))


def degrees(config: DiffusionParallelConfig) -> tuple[int, int, int]:
    return config.cfg_parallel_size, config.ulysses_degree, config.ring_degree


def gpus(count: int, *, takes_all: bool = False, per_node: int | None = None, known: bool = True) -> Devices:
    return Devices("H100", count, takes_all, per_node or count, H100 if known else None, "no figures of H100 are known")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """Qwen-Image at 2048 x 2048, as it was counted; without the time that counting takes."""
    qwen = ModelCost(
        "Qwen-Image", Size(2048, 2048), 16512, 24, 128, 60, 224.4e12, 201.0e12, 20.43e9, block_elements=5e8,
        branches=2, encoder_parameters=8.29e9, vae_flops=51.7e12, vae_parameters=0.127e9, vae_elements=1.6e9,
    )  # fmt: skip
    small = replace(qwen, tokens=144, linear_flops=2e12, attention_flops=1e10)

    def cost(_location: str, *, height: int = 2048, branches: int = 2, **_: Any) -> ModelCost:
        return replace(qwen if height == 2048 else small, branches=branches)

    monkeypatch.setattr("omni_sp.planner.model_cost", cost)
    return ModelSource(name="x", location=".")


def test_guidance_comes_first_and_the_reason_is_told(source: ModelSource) -> None:
    choice = choose_degrees(source, gpus(8), {"height": 2048, "width": 2048, "steps": None})
    assert (choice.config.cfg_parallel_size, choice.config.world_size) == (2, 8)
    assert str(choice).startswith('parallel_config="auto": cfg_parallel_size 2 × ')
    assert "on 8 x H100: " in choice.why
    assert "are predicted for 2048 x 2048" in choice.why
    unguided = choose_degrees(source, gpus(8), {"height": 2048, "width": 2048, "branches": 1})
    assert unguided.config.cfg_parallel_size == 1


def test_ranks_that_are_there_are_all_taken(source: ModelSource) -> None:
    """A small picture is quicker on fewer; a job's ranks are as many as they are, and Ulysses stays on a node."""
    small = {"height": 64, "branches": 1}
    assert choose_degrees(source, gpus(8), small).config.world_size < 8
    assert choose_degrees(source, gpus(8, takes_all=True), small).config.world_size == 8
    spread = choose_degrees(source, gpus(6, takes_all=True, per_node=3), {"branches": 1})
    assert 3 % spread.config.ulysses_degree == 0
    assert spread.config.world_size == 6


def test_a_folder_is_counted(tmp_path: Path) -> None:
    source = pipeline(tmp_path, "FluxPipeline", "FluxTransformer2DModel", num_layers=1, num_single_layers=1)
    choice = choose_degrees(source, gpus(2, takes_all=True), {"height": 256, "width": 256})
    assert choice.config.world_size == 2
    assert "are predicted for 256 x 256" in choice.why


def test_weights_that_do_not_fit_are_sharded_unless_they_are_offloaded(source: ModelSource) -> None:
    devices = Devices("L20", 4, True, 4, machine("L20"))
    sharded = choose_degrees(source, devices)
    assert (sharded.config.shard_weights, sharded.config.world_size) == (True, 4)
    assert "4 ranks, weights sharded, on 4 x L20" in str(sharded)
    offloaded = choose_degrees(source, devices, offloads=True)
    assert (offloaded.config.shard_weights, offloaded.config.world_size) == (False, 4)
    assert "by a simple rule" not in offloaded.why


def test_quantised_weights_need_less(source: ModelSource) -> None:
    devices = Devices("L40S", 2, True, 2, replace(machine("L40S"), memory_gb=44.0))
    for quantization, is_sharded in ((None, True), ("int8", False)):
        found = choose_degrees(source, devices, {"branches": 1}, quantization=quantization)
        assert found.config.shard_weights == is_sharded, found
        assert "by a simple rule" not in found.why
    in_float32 = replace(devices, element_bytes=4, machine=replace(machine("L40S"), memory_gb=22.0))
    assert choose_degrees(source, in_float32, {"branches": 1}, quantization="fp8").config.world_size == 2


def measured(device_type: str, device: str, dtype: str) -> Measured:
    exchange = (Transfer(1000, 50e-6), Transfer(10**8, 1e-3))
    return Measured(
        when="2026-01-02T03:04:05+00:00", host="here", device_type=device_type, device=device, num_devices=2,
        torch="2", transport="gloo", model="m", shape="s", attention_share=0.5, dtype=dtype, kernels=(),
        linear_tflops=0.123, exchange=exchange, memory_gb=8.0, memory_gb_per_s=20.0, host_gb_per_s=9.0,
    )  # fmt: skip


def test_what_the_doctor_measured_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: ModelSource
) -> None:
    monkeypatch.setenv("OMNI_SP_CACHE", str(tmp_path))
    published = devices_here("cpu", None, 2)
    save_measured(measured("cpu", "some CPU", "float32"))
    here = devices_here("cpu", None, 2)
    assert published.machine is not None
    assert here.machine is not None
    assert (published.when, here.when) == ("", "2026-01-02T03:04:05+00:00")
    assert here.machine.tflops == pytest.approx(0.123) != published.machine.tflops
    assert here.machine.memory_gb == published.machine.memory_gb  # as it is now
    assert (
        "on 2 x CPU core (as omni-sp doctor measured it, 2026-01-02T03:04:05+00:00)" in choose_degrees(source, here).why
    )
    assert devices_here("cpu", "bfloat16", 2).when == ""  # another dtype was measured
    monkeypatch.setattr("omni_sp.engine.automatic.shared_device", lambda _: (None, 2))
    monkeypatch.setattr("omni_sp.engine.automatic._gpu", lambda: ("NVIDIA H100", replace(H100, memory_gb=79.0)))
    save_measured(measured("cuda", "NVIDIA H100", "bfloat16"))
    gpu = devices_here()
    assert gpu.machine is not None
    assert gpu.machine.tflops == pytest.approx(0.123)
    assert (gpu.machine.memory_gb, gpu.count) == (79.0, 2)
    assert devices_here(dtype="float32").when == ""
    save_measured(measured("cuda", "another GPU", "bfloat16"))
    assert devices_here().machine == replace(H100, memory_gb=79.0)


@pytest.mark.parametrize(
    ("count", "per_node", "expected"), [(8, 8, (2, 4, 1)), (16, 16, (2, 4, 2)), (8, 2, (2, 2, 2)), (3, 3, (1, 3, 1))]
)
def test_the_simple_rule(count: int, per_node: int, expected: tuple[int, int, int], tmp_path: Path) -> None:
    source = pipeline(tmp_path, "WanPipeline", "NoSuchTransformer", num_attention_heads=6)
    choice = choose_degrees(source, gpus(count, takes_all=True, per_node=per_node))
    assert degrees(choice.config) == expected
    assert "by a simple rule" in choice.why
    assert "no class NoSuchTransformer" in choice.why
    assert degrees(simple_config(source.location, gpus(count, per_node=per_node))) == expected


def test_devices_without_figures_and_models_without_configuration_have_the_simple_rule(tmp_path: Path) -> None:
    source = ModelSource(name="x", location=str(tmp_path / "x.safetensors"))
    choice = choose_degrees(source, gpus(4, known=False), {"branches": 2})
    assert degrees(choice.config) == (2, 2, 1)
    assert "no figures of H100 are known" in choice.why
    alone = choose_degrees(source, gpus(1))
    assert degrees(alone.config) == (1, 1, 1)


@pytest.mark.parametrize("asked", ["atuo", "auto:0", "auto:x", ""])
def test_other_texts_are_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="parallel_config="):
        is_automatic(asked)
    with pytest.raises(ConfigError, match="parallel_config="):
        Omni("omni-sp/shapes", parallel_config=asked)


def propose_by_rank(mesh: ParallelMesh, asked: str) -> Any:
    """On one rank of a program: each would choose something else."""
    own = DiffusionParallelConfig(cfg_parallel_size=2, ring_degree=2) if mesh.rank == 0 else DiffusionParallelConfig()
    said: list[str] = []
    source = ModelSource(name="x", location="x")
    with patch("omni_sp.engine.automatic.choose_degrees", lambda *_, **__: Choice(own, "as I say")):
        try:
            config = automatic_config(asked, source, device="cpu", dtype=None, say=said.append)
        except ConfigError as error:
            return str(error)
    return degrees(config), len(said)


def test_all_ranks_take_what_rank_0_chooses(ranks: RankPool) -> None:
    found = ranks.run(propose_by_rank, "auto", ulysses=4)
    assert found == [((2, 1, 2), 1), *[((2, 1, 2), 0)] * 3]
    refused = ranks.run(propose_by_rank, "auto:2", ulysses=4)
    assert all("the program around has 4 ranks" in text for text in refused)
