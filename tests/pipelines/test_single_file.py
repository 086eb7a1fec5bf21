"""A model that is one file: it draws what the folder draws, and what the file cannot give is said."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_sp import (
    ConfigError,
    DiffusionParallelConfig,
    ModelNotFoundError,
    Omni,
    OmniDiffusionSamplingParams,
    ParallelMesh,
    parallelize,
)
from omni_sp.pipelines import single_file
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.run import run_call
from omni_sp.pipelines.shapes import SHAPES_MODEL, shapes_folder
from omni_sp.sharding.weight_parts import leaves_of
from omni_sp.testing.models import save_wan
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error

HAS_GGUF = importlib.util.find_spec("gguf") is not None
CALL = {"prompt": "a red circle", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The weights of the demo model's transformer."""
    weights: dict[str, torch.Tensor] = load_file(next((shapes_folder() / "transformer").glob("*.safetensors")))
    return weights


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("single") / "shapes.safetensors"
    save_file(weights, path)
    return path


def drawn(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    latent: torch.Tensor = run_call(pipe, CALL, seed=3, device="cpu").images[0]
    return latent


def test_a_file_draws_what_the_folder_draws(file: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(shapes_folder(), config, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    shutil.copytree(shapes_folder() / "vae", config / "vae", dirs_exist_ok=True)
    assert not list((config / "transformer").glob("*.safetensors"))
    wanted = drawn(load_pipeline(resolve_model(SHAPES_MODEL)))
    calls: list[tuple[str, int, int]] = []
    for model in (file, str(file)):
        source = resolve_model(model, config)
        pipe = load_pipeline(source, decodes=False, on_component=lambda *call: calls.append(call))
        assert torch.equal(drawn(pipe), wanted)
    assert calls[0] == ("", 0, 5)
    half = load_pipeline(resolve_model(file, SHAPES_MODEL), dtype="bfloat16")
    assert {half.transformer.dtype, half.vae.dtype} == {torch.bfloat16}
    assert resolve_model(file, SHAPES_MODEL).sampling_defaults == resolve_model(SHAPES_MODEL).sampling_defaults


def refusal(file: Path, config: Path | str | None = SHAPES_MODEL) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        load_pipeline(resolve_model(file, config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_not_what_the_pipeline_needs(
    tmp_path: Path, file: Path, weights: dict[str, torch.Tensor]
) -> None:
    path, name = tmp_path / "other.safetensors", next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, path)
    assert f"lacks weights that {shapes_folder()} needs" in refusal(path)
    save_file({**weights, name: torch.zeros(3)}, path)
    assert "does not fit" in refusal(path)
    path.write_bytes(b"no weights")
    assert "cannot be read as safetensors" in refusal(path)
    save_wan(tmp_path / "wan")
    assert "has two transformers" in refusal(file, tmp_path / "wan")


def test_the_pipeline_that_a_file_belongs_to(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not say which pipeline it belongs to: give single_file_config" in refusal(file, None)
    # What diffusers knows by its weights, it wants to look up on the hub.
    known = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(3),
               "guidance_in.in_layer.bias": torch.zeros(3), "img_in.weight": torch.zeros(3, 64)}, known)  # fmt: skip

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", offline)
    message = refusal(known, None)
    assert "belongs to black-forest-labs/FLUX.1-dev, whose configuration cannot be read (no network)" in message
    assert "give single_file_config" in message


def test_a_gguf_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no weights")
    assert "cannot be read as GGUF" in refusal(path)
    path.write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setattr("diffusers.utils.is_gguf_available", lambda: False)
    assert "needs a package: pip install gguf" in refusal(path)


def save_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the weights of linear layers in several kinds of blocks, and the others as they are."""
    import gguf

    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "BF16", "Q5_1")]
    writer = gguf.GGUFWriter(str(path), "qwen_image")
    for number, (name, weight) in enumerate(weights.items()):
        numbers = weight.float().numpy()
        if weight.ndim == 2 and "transformer_blocks" in name:
            kind = kinds[number % len(kinds)]
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def gguf_alone_and_together(mesh: ParallelMesh, path: Path, compiled: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    pipe = load_pipeline(resolve_model(path, SHAPES_MODEL), shares_weights=mesh.weights.size > 1)
    parts = [x.clone() for weight in pipe.transformer.parameters() for x in leaves_of(weight)]
    kinds = {type(weight).__name__ for weight in pipe.transformer.parameters()}
    wanted, held = drawn(pipe), sum(x.nbytes for x in parts)
    handle = parallelize(pipe, mesh, compile={"backend": "eager"} if compiled else False)
    resting = handle.weight_bytes
    errors = [relative_error(drawn(pipe), wanted) for _ in range(2)]
    found = {"errors": errors, "held": (resting, handle.weight_bytes, held), "blocks": handle.blocks}
    handle.remove()
    after = [x for weight in pipe.transformer.parameters() for x in leaves_of(weight)]
    same = len(after) == len(parts) and all(map(torch.equal, after, parts))
    return {**found, "restored": same and torch.equal(drawn(pipe), wanted), "kinds": kinds}


@pytest.mark.skipif(not HAS_GGUF, reason="needs gguf")
@pytest.mark.parametrize(
    ("layout", "compiled"),
    [({"ulysses": 2, "shard_weights": True}, False), ({"ring": 2}, True), ({"cfg": 2, "ulysses": 2}, False)],
    ids=str,
)
def test_ranks_draw_what_one_process_draws_from_a_gguf_file(
    ranks: RankPool, tmp_path: Path, weights: dict[str, torch.Tensor], layout: dict[str, Any], compiled: bool
) -> None:
    save_gguf(tmp_path / "shapes.gguf", weights)
    for found in ranks.run(gguf_alone_and_together, tmp_path / "shapes.gguf", compiled, **layout):
        assert max(found["errors"]) <= 1e-5
        assert found["restored"]
        assert found["kinds"] == {"Parameter", "GGUFParameter"}
        first, second, whole = found["held"]
        assert first == second
        assert first <= (0.75 if "shard_weights" in layout else 1.01) * whole
        # What computes with such a weight makes a tensor of its memory that no operator has made.
        assert all("neither an argument nor a weight" in reason for reason in found["blocks"].followed)


@pytest.mark.skipif(not HAS_GGUF, reason="needs gguf")
def test_omni_reads_a_gguf_file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "shapes.gguf"
    save_gguf(path, weights)
    pictures = []
    params = OmniDiffusionSamplingParams(seed=3, height=64, width=48, num_inference_steps=2)
    for config in (None, DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2, shard_weights=True)):
        with Omni(path, config, single_file_config=SHAPES_MODEL) as omni:
            image = omni.generate("a red circle", params)[0].images[0]
        pictures.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int())
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_a_file_with_text_encoders_is_a_whole_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    path = tmp_path / "whole.safetensors"
    save_file({"text_encoders.clip_l.weight": torch.zeros(3), "vae.weight": torch.zeros(3)}, path)
    whole = load_pipeline(resolve_model(SHAPES_MODEL))
    asked: list[tuple[Any, ...]] = []

    def from_single_file(file: str, *, config: str, torch_dtype: Any) -> Any:
        asked.append((file, config, torch_dtype))
        return whole

    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_single_file", from_single_file, raising=False)
    assert load_pipeline(resolve_model(path, SHAPES_MODEL)) is whole
    assert asked == [(str(path), str(shapes_folder()), torch.float32)]


def test_names_of_files_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("city96/FLUX-gguf/flux-Q4_0.gguf", "https://huggingface.co/city96/FLUX-gguf/blob/main/flux-Q4_0.gguf")
    looked_up: list[tuple[Any, ...]] = []

    def look_up(*where: Any) -> str:
        looked_up.append(where)
        return "/cached"

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    for name in names:
        assert single_file.hub_file(name) == ("city96/FLUX-gguf", "flux-Q4_0.gguf")
        assert resolve_model(name, SHAPES_MODEL).location == name
    assert looked_up == [("city96/FLUX-gguf", "flux-Q4_0.gguf")] * 2
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *where: "/cache/" + "/".join(where))
    assert single_file.local_file(names[1]) == "/cache/city96/FLUX-gguf/flux-Q4_0.gguf"
    for name in ("owner/repository", "a/b/c", "file.safetensors", "a/b/c.ckpt"):
        assert single_file.hub_file(name) is None


def test_files_of_other_kinds_and_configurations_without_a_file(tmp_path: Path) -> None:
    old = tmp_path / "model.ckpt"
    old.write_bytes(b"a pickle")
    with pytest.raises(ModelNotFoundError, match=r"is a file of another kind: .* a \.safetensors or \.gguf file"):
        resolve_model(old)
    with pytest.raises(ConfigError, match="single_file_config is for a model that is one file"):
        resolve_model(SHAPES_MODEL, SHAPES_MODEL)
    with pytest.raises(ModelNotFoundError, match="no file"):
        resolve_model(tmp_path / "nowhere.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="is one file: give the folder or hub id of a pipeline"):
        resolve_model(file, file)
    with pytest.raises(ModelNotFoundError, match="single_file_config: no folder"):
        resolve_model(file, "/nowhere")


def test_quantised_weights_are_not_taken_for_plain_ones(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path, name = tmp_path / "quantised.safetensors", next(name for name in weights if name.endswith(".weight"))
    save_file({**weights, name: weights[name].to(torch.int8)}, path)
    assert f"holds quantised weights ({name})" in refusal(path)
    scale = name.replace(".weight", ".scale_weight")
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn), scale: torch.ones(1)}, path)
    assert f"holds quantised weights ({scale})" in refusal(path)
    assert f"holds quantised weights ({scale})" in refusal(path, None)


def test_a_suffix_in_capitals_is_named(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "SHAPES.SafeTensors"
    save_file(weights, path)
    assert "small letters: rename it" in refusal(path)
