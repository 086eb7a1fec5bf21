"""Quantised weights, parts on the CPU, and a VAE in another dtype: over ranks as in one process, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxPipeline

from omni_sp import ConfigError, DiffusionParallelConfig, ModelNotFoundError, ParallelMesh, parallelize
from omni_sp.errors import UnsupportedModelError
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL, shapes_folder
from omni_sp.requests import engine_options
from omni_sp.testing.models import save_flux
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.library_versions import OFFLOADS_GROUPS_ON_CPU

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
OPTIONS: list[dict[str, str]] = [
    {"offload": "model"},
    {"vae_dtype": "bfloat16"},
    *([{"offload": "group"}] if OFFLOADS_GROUPS_ON_CPU else []),
    *([{"quantization": "int8"}, {"quantization": "fp8", "offload": "model"}] if HAS_TORCHAO else []),
]
CALL = {**SHAPES_CALL, "height": 80, "width": 48, "num_inference_steps": 2}


def draw(pipe: Any, output_type: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipe("a red circle", **CALL, output_type=output_type, generator=generator).images).float()


def alone_and_together(mesh: ParallelMesh, options: dict[str, str], model: str | Path = SHAPES_MODEL) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    pipe = load_pipeline(resolve_model(model), **options)  # type: ignore[arg-type]
    kinds = ("latent", "pt")
    wanted = [draw(pipe, kind) for kind in kinds]
    handle = parallelize(pipe, mesh)
    got = [draw(pipe, kind) for kind in kinds]
    blocks, vaes = handle.blocks.as_dict(), handle.vaes.num_ranks
    handle.remove()
    return {
        "errors": [relative_error(x, y) for x, y in zip(got, wanted, strict=True)],
        "restored": torch.equal(draw(pipe, "pt"), wanted[1]),
        "blocks": blocks,
        "vae_ranks": vaes,
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ranks_draw_what_one_process_draws(ranks: RankPool, options: dict[str, str]) -> None:
    axis = "ring" if "quantization" in options else "cfg" if "vae_dtype" in options else "ulysses"
    for found in ranks.run(alone_and_together, options, vae_parallel=True, **cast("Any", {axis: 2})):
        assert found["errors"][0] <= 1e-5
        assert found["errors"][1] <= (2e-2 if "vae_dtype" in options else 1e-5)
        assert found["restored"]
        assert found["vae_ranks"] == 2
        moves = "group offloading moves its weights"
        assert set(found["blocks"]["followed"]) == ({moves} if options.get("offload") == "group" else set())


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
@pytest.mark.parametrize("is_saved", [False, True], ids=["while it is read", "when it was saved"])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantised_weights_with_every_axis(ranks: RankPool, tmp_path: Path, quantization: str, is_saved: bool) -> None:
    layout: dict[str, Any] = {"cfg": 2, "ulysses": 2, "shard_weights": True, "vae_parallel": True}
    options, model = {"quantization": quantization}, SHAPES_MODEL
    if is_saved:
        shutil.copytree(shapes_folder(), tmp_path, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)
        load_pipeline(resolve_model(model), quantization=quantization).transformer.save_pretrained(
            tmp_path / "transformer"
        )
        options, model = {}, str(tmp_path)
    for found in ranks.run(alone_and_together, options, model, **layout):
        assert max(found["errors"]) <= 1e-5
        assert found["restored"]
        assert found["vae_ranks"] == 4
        assert found["blocks"]["replayed"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization='int4': give 'int8' or 'fp8'"),
        ({"offload": "disk"}, "offload='disk': give 'model' or 'group', or None"),
        ({"vae_dtype": "int8"}, "vae_dtype='int8': give one of float32"),
        ({"offload": "model", "cuda_graphs": True}, "offload='model' and cuda_graphs=True, which reads weights where"),
        ({"offload": "group", "compile": True}, "offload='group' and compile=True, which compiles blocks without"),
        (
            {"offload": "group", "parallel_config": DiffusionParallelConfig(ulysses_degree=2, shard_weights=True)},
            "offload='group' and shard_weights=True, which shards the weights that it moves: leave out one of them",
        ),
        *([] if HAS_TORCHAO else [({"quantization": "fp8"}, "quantization='fp8' needs torchao: pip install")]),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_options(SHAPES_MODEL, **options)
    assert str(caught.value).startswith(message)


def test_what_a_model_cannot_have_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_flux(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(ConfigError, match=r"quantization='int8': transformer of .* was quantised .* \(bitsandbytes\)"):
        load_pipeline(resolve_model(tmp_path), quantization="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantised when it was saved, by what diffusers runs on GPUs alone"):
            load_pipeline(resolve_model(tmp_path))
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ConfigError, match="vae_dtype='float32' is for pipelines in folders"):
        load_pipeline(resolve_model(weights, tmp_path), vae_dtype="float32")
    with pytest.warns(UserWarning, match="all weights of the transformer .* since they are in a single file"):
        load_pipeline(resolve_model(weights, tmp_path), shares_weights=True)
    monkeypatch.setattr(FluxPipeline, "model_cpu_offload_seq", None)
    with pytest.raises(UnsupportedModelError, match="offload='model' of FluxPipeline: Model CPU offload cannot be"):
        load_pipeline(resolve_model(tmp_path), offload="model")
    (tmp_path / "model_index.json").write_text(json.dumps({name: x for name, x in index.items() if name != "vae"}))
    with pytest.raises((ConfigError, ModelNotFoundError)):
        load_pipeline(resolve_model(tmp_path), vae_dtype="bfloat16")


def test_a_vae_takes_latents_of_another_dtype(tmp_path: Path) -> None:
    save_flux(tmp_path)
    vae = load_pipeline(resolve_model(tmp_path), dtype="bfloat16", vae_dtype="float32").vae
    assert vae.dtype == torch.float32
    latents = torch.randn(1, vae.config.latent_channels, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(vae.decode(latents).sample, type(vae).decode(vae, latents.float()).sample)
        assert vae.encode(x=torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)).latent_dist.mean.dtype == torch.float32
