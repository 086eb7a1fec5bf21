"""Costs, machines, predictions and the search: what is counted, and that more of a good thing never hurts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_sp import DiffusionParallelConfig
from omni_sp.errors import ConfigError
from omni_sp.pipelines.shapes import shapes_folder
from omni_sp.planner import Degrees, Machine, ModelCost, Size, estimate, machine, model_cost, plan
from omni_sp.planner.cost import MODELS_FILE
from omni_sp.planner.estimate import exchange
from omni_sp.planner.folders import read_folder
from omni_sp.planner.machines import gpu_names, link, link_names, machine_of_device
from omni_sp.planner.published import PUBLISHED
from omni_sp.planner.report import as_svg, as_text
from omni_sp.planner.search import ALL

# Qwen-Image at 2048 x 2048, as it is counted below.
QWEN = ModelCost(
    "Qwen-Image", Size(2048, 2048), 16512, 24, 128, 60, 224.4e12, 201.0e12, 20.43e9,
    block_elements=5.08e8, branches=2, steps=50, encoder_parameters=8.29e9, vae_flops=51.7e12,
    vae_parameters=0.127e9, vae_elements=1.6e9,
)  # fmt: skip


def test_qwen_image_is_counted_by_its_own_code() -> None:
    cost = model_cost("Qwen/Qwen-Image", height=2048, width=2048)
    assert (cost.tokens, cost.heads, cost.head_dim, cost.blocks) == (128 * 128 + 128, 24, 128, 60)
    assert cost.attention_flops == 60 * 4 * 24 * 128 * 16512**2
    # 12 x width² of each block for each picture token, and a little more
    assert cost.linear_flops == pytest.approx(2 * 60 * 12 * 3072**2 * 16512, rel=0.02)
    assert cost.parameters == pytest.approx(20.43e9, rel=0.001)
    assert (cost.branches, cost.steps, cost.is_estimate) == (2, 50, False)
    assert cost.flops == pytest.approx(QWEN.flops, rel=0.001)


def test_a_model_is_found_by_parts_of_its_name_and_sized_as_published() -> None:
    cost = model_cost("Wan2.2", branches=1)
    assert (cost.name, cost.size) == ("Wan2.2-T2V-A14B", Size(720, 1280, 81))
    assert (cost.tokens, cost.blocks, cost.transformers, cost.forwards) == (75600, 40, 2, 40)


def test_twice_the_frames_are_about_twice_the_tokens() -> None:
    one = model_cost("Wan2.2", height=128, width=128, num_frames=41)
    two = model_cost("Wan2.2", height=128, width=128, num_frames=81)
    assert (one.tokens, two.tokens) == (11 * 64, 21 * 64)
    assert two.linear_flops == pytest.approx(one.linear_flops * 21 / 11, rel=0.2)


def config_folder(folder: Path, **config: object) -> str:
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_folder_is_counted_by_its_own_configuration(tmp_path: Path) -> None:
    model = config_folder(tmp_path, _class_name="FluxTransformer2DModel", num_layers=3, num_single_layers=4)
    cost = model_cost(model, height=256, width=256)
    assert (cost.blocks, cost.tokens, cost.is_estimate) == (7, 512 + 256, False)


def test_a_folder_whose_text_has_other_channels_is_estimated(tmp_path: Path) -> None:
    model = config_folder(tmp_path, _class_name="FluxTransformer2DModel", num_layers=3, joint_attention_dim=32)
    cost = model_cost(model, height=256, width=256)
    assert (cost.blocks, cost.tokens, cost.is_estimate) == (3 + 38, 256, True)


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Wan2.2-T2V-A14B", "SD3.5-large"])
def test_a_class_that_nobody_described_is_estimated_nearly_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = model_cost(name)
    published = PUBLISHED[name]
    model = config_folder(tmp_path, _class_name=published.transformer, **published.config)
    monkeypatch.setattr("omni_sp.planner.cost.PUBLISHED", {})
    size = counted.size
    cost = model_cost(model, height=size.height, width=size.width, num_frames=size.frames)
    assert cost.is_estimate
    assert cost.parameters == counted.parameters
    assert cost.flops == pytest.approx(counted.flops, rel=0.35)


def test_every_published_model_has_a_pipeline() -> None:
    entries = json.loads(MODELS_FILE.read_text())
    assert entries.keys() - {"_vaes"} == PUBLISHED.keys()
    assert {entry["vae"] for entry in entries.values() if "vae" in entry} <= entries["_vaes"].keys()


def test_machines_are_known_by_name() -> None:
    assert machine("rtx 4090").name == "RTX4090"
    assert machine("h100", link="pcie4").link == link("pcie4")
    for name in gpu_names():
        one = machine(name)
        assert one.source
        assert one.tflops >= one.fp32_tflops > 0
    assert all(link(name).source for name in link_names())


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_machines_are_known_by_what_drivers_call_them(device: str, name: str | None) -> None:
    found = machine_of_device(device, memory_gb=7.0)
    assert (found and (found.name, found.memory_gb)) == (name and (name, 7.0))


def test_a_card_for_pcie_has_no_nvlink() -> None:
    found = machine_of_device("NVIDIA A100-PCIE-40GB")
    assert found is not None
    assert found.link == link("pcie4")


def test_the_parts_of_a_folder_are_counted_from_the_heads_of_its_files() -> None:
    folder = read_folder(str(shapes_folder()))
    assert folder is not None
    assert (folder.transformers, folder.branches, folder.vae) == (1, 2, "AutoencoderKLQwenImage")
    assert folder.vae_parameters == pytest.approx(1.81e6, rel=0.01)
    assert folder.encoder_parameters > 0
    assert read_folder("no/such-model") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: machine("h1000"), "did you mean H100"),
        (lambda: machine("tpu"), "known are H100, H200"),
        (lambda: link("nvlink9"), "nvlink"),
        (lambda: machine("h100", hots_us=3), "no hots_us"),
        (lambda: model_cost("Qwen-Imag3"), "did you mean Qwen-Image"),
        (lambda: model_cost("FLUX.1-dev", height=0), "height"),
        (lambda: model_cost("a" * 5000), "nothing is known of"),
        (lambda: model_cost("FLUX.1-dev", height=10**6, width=10**6), "at most 300000000 pixels"),
        (lambda: model_cost("Wan2.2", num_frames=10**9), "at most 300000000 pixels"),
        (lambda: model_cost("FLUX.1-dev", height=8, width=8), "has no token"),
        (lambda: plan(QWEN, gpus=0), "gpus"),
        (lambda: plan(QWEN, gpus=10**12), "from 1 to 65536"),
        (lambda: plan(QWEN, gpus=2, consider=["pipeline"]), "pipeline"),
        (lambda: plan(QWEN, gpus=2, gpu="RTX4090"), "RTX4090 has 24 GB"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": "many"},
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": -1, "num_layers": 1, "num_single_layers": 1},
        {"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 1e99},
        {"_class_name": "FluxTransformer2DModel", "num_layers": None},
        {"_class_name": "FluxPipeline"},
        {"_class_name": "__version__"},
        {"_class_name": ["a", "list"]},
        ["no", "object"],
    ],
)
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, config: Any) -> None:
    for name, text in (
        ("transformer/config.json", json.dumps(config)),
        ("vae/x.safetensors", "this is no file of weights"),
        ("text_encoder/x.safetensors", "\x02" + 7 * "\0" + "[]"),
        ("model_index.json", json.dumps({"_class_name": config})),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        model_cost(str(tmp_path))


def test_the_bytes_are_those_of_the_layout() -> None:
    """Of 8 tokens on 2 ranks each has 4, sends half its heads of q, k and v, and gets back as much."""
    found = exchange(8, 4, 16, 2, 1)
    assert found.ulysses_bytes == (3 * 4 * 2 + 4 * 2) * 16 * 2
    assert (found.share, found.token_share, found.ring_bytes) == (0.5, 0.5, 0)
    ring = exchange(8, 4, 16, 1, 2)
    assert (ring.ring_bytes, ring.ulysses_bytes) == (2 * 4 * 4 * 16 * 2, 0)
    assert exchange(1000, 30, 64, 8, 1).share == 4 / 30
    assert exchange(1000, 6, 64, 8, 1).idle == 2


DEGREES = st.builds(
    Degrees,
    ulysses_degree=st.sampled_from([1, 2, 3, 4, 8]),
    ring_degree=st.sampled_from([1, 2, 4]),
    cfg_parallel_size=st.sampled_from([1, 2]),
    vae_parallel=st.booleans(),
    shard_weights=st.booleans(),
    offload=st.booleans(),
)
GPUS = st.sampled_from(gpu_names()).map(machine)


@settings(max_examples=200, deadline=None)
@given(DEGREES, GPUS, st.floats(1.0, 50.0))
def test_more_bandwidth_is_never_slower(degrees: Degrees, on: Machine, factor: float) -> None:
    before = estimate(QWEN, on, degrees).seconds
    faster = replace(on.link, gb_per_s=on.link.gb_per_s * factor)
    assert estimate(QWEN, replace(on, link=faster), degrees).seconds <= before * (1 + 1e-9)
    assert estimate(QWEN, replace(on, tflops=on.tflops * factor), degrees).seconds <= before * (1 + 1e-9)
    less = replace(on.link, latency_us=on.link.latency_us / factor)
    assert estimate(QWEN, replace(on, link=less), degrees).seconds <= before * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(DEGREES)
def test_more_ranks_never_need_more_memory_each(degrees: Degrees) -> None:
    on = machine("H100")
    before = estimate(QWEN, on, degrees).memory_gb
    for name in ("ulysses_degree", "ring_degree"):
        more = replace(degrees, **{name: 2 * getattr(degrees, name)})
        assert estimate(QWEN, on, more).memory_gb <= before * (1 + 1e-9)
    whole = replace(degrees, offload=False, shard_weights=False)
    assert estimate(QWEN, on, replace(whole, offload=True)).memory_gb < estimate(QWEN, on, whole).memory_gb


def test_guidance_is_split_first_and_the_vae_over_all() -> None:
    found = plan(QWEN, gpus=8, gpu="h800", consider=ALL)
    assert found.best.cfg_parallel_size == 2
    assert found.best.sequence == 4
    assert found.best.vae_parallel
    assert not found.best.shard_weights
    assert found.choices[0].seconds < 112.5 / 3.65  # what others reach on 8 of them
    assert [one.seconds for one in found.choices] == sorted(one.seconds for one in found.choices)
    assert len(found.reasons) == len(found.choices) - 1


def test_only_what_the_configuration_takes_is_recommended() -> None:
    found = plan(QWEN, gpus=8, gpu="h800")
    assert DiffusionParallelConfig(**found.config_arguments).world_size == 8


def test_throughput_prefers_replicas() -> None:
    found = plan(QWEN, gpus=4, gpu="h100", throughput=True)
    assert (found.best.data_parallel_size, found.best.one_result) == (4, 1)


def test_what_does_not_fit_whole_is_sharded_or_offloaded() -> None:
    found = plan(QWEN, gpus=4, gpu="L20", consider=ALL)
    assert found.best.shard_weights or found.best.offload
    assert found.choices[0].memory_gb <= 48


@pytest.mark.parametrize(
    ("cost", "gpus", "gpu", "words"),
    [
        (replace(QWEN, heads=30, branches=1), 8, "h100", "ulysses 8 of 30 heads: the busiest rank has 4"),
        (replace(QWEN, heads=6, branches=1), 8, "h100", "ulysses 8 of 6 heads leaves 2 ranks idle"),
        (replace(QWEN, branches=1), 4, "h100", "only 2 of 4 devices share a result"),
    ],
)
def test_each_reason_is_a_sentence(cost: ModelCost, gpus: int, gpu: str, words: str) -> None:
    on = machine(gpu, link="nvlink5")
    on = replace(
        on, link=replace(on.link, gb_per_s=1e5, latency_us=0.0), exchange_us=0.0, host_us=0.0, memory_gb_per_s=1e6
    )
    found = plan(cost, gpus=gpus, gpu=on, consider=ALL)
    assert any(words in reason for _, reason in found.reasons), found.reasons


def test_slow_links_and_slow_hosts_are_named() -> None:
    slow = plan(replace(QWEN, branches=1), gpus=8, gpu=machine("h100", link="ethernet-10"), consider=ALL)
    assert any("takes longer than the attention" in reason for _, reason in slow.reasons)
    assert slow.best.one_result == 1  # eight of them are slower than one
    guided = plan(QWEN, gpus=8, gpu="h100", consider=ALL)
    assert any("guidance exchanges nothing" in reason for _, reason in guided.reasons)


def test_what_does_not_fit_comes_last_with_its_size() -> None:
    cost = replace(QWEN, block_elements=4e9)
    small = replace(machine("h100"), memory_gb=65.0)
    found = plan(cost, gpus=2, gpu=small, consider=["ulysses_degree", "data_parallel_size"])
    assert found.reasons[-1][1].startswith("needs ")
    assert found.reasons[-1][1].endswith(" GB of 65 GB")


def test_a_plan_as_text_json_and_picture() -> None:
    found = plan(QWEN, gpus=2, gpu="h100")
    text = as_text(found)
    assert "Qwen-Image, 2048 x 2048, 50 steps x 2 branches, on 2 x H100" in text
    assert "why not the others:" in text
    assert "vae_parallel=True" in text
    assert json.loads(json.dumps(found.as_dict()))["gpus"] == 2
    svg = as_svg(found)
    assert svg.count('height="18"') == 7 * len(found.choices)
    assert svg.startswith("<svg ")
