"""Transformers of which each rank reads its part alone, and those that it has to read whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from omni_sp import ParallelMesh, parallelize
from omni_sp.pipelines import sharded_loading
from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.pipelines.load import ModelSource, load_pipeline, resolve_model
from omni_sp.pipelines.sharded_loading import read_share, transformers_to_share
from omni_sp.sharding.replay import block_lists
from omni_sp.sharding.weight_parts import StoredWeight, leaves_of
from omni_sp.testing.models import save_wan
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.sharding.quantised import ScaledWeight

CALL = {"prompt": "a cat walks", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
PARTS = ("transformer", "transformer_2")
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan, with one of its two transformers in several files of bfloat16."""
    path = tmp_path_factory.mktemp("wan")
    save_wan(path)
    model = WanTransformer3DModel.from_pretrained(path / PARTS[1]).to(torch.bfloat16)
    (path / PARTS[1] / FILE).unlink()
    model.save_pretrained(path / PARTS[1], max_shard_size="50KB")
    assert (path / PARTS[1] / f"{FILE}.index.json").is_file()
    return path


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return torch.as_tensor(pipe(**CALL, generator=generator, output_type="latent").frames)


def read_and_whole(mesh: ParallelMesh, folder: Path, dtype: str) -> dict[str, Any]:
    warnings.simplefilter("error", UserWarning)
    source = resolve_model(folder)
    counted = [0]
    read = StoredWeight._read

    def counting(self: StoredWeight, first: int, count: int) -> torch.Tensor:
        counted[0] += count * self.dtype.itemsize
        return read(self, first, count)

    StoredWeight._read = counting  # type: ignore[method-assign]
    try:
        pipe = load_pipeline(source, dtype=dtype, shares_weights=True)
        unread = [has_unread_weights(getattr(pipe, name)) for name in PARTS]
        for name in PARTS:
            read_share(getattr(pipe, name))
        handle = parallelize(pipe, mesh)
    finally:
        StoredWeight._read = read  # type: ignore[method-assign]
    held, drawn = handle.weight_bytes, draw(pipe)
    handle.remove()
    whole = load_pipeline(source, dtype=dtype)
    same = [
        (one := state(getattr(pipe, name))).keys() == (other := state(getattr(whole, name))).keys()
        and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
        for name in PARTS
    ]
    handle = parallelize(whole, mesh)
    found = {
        "unread": unread,
        "same": same,
        "error": relative_error(draw(whole), drawn),
        "read": counted[0],
        "held": (held, handle.weight_bytes),
        "as usual": [
            (type(one), one.training, one.dtype, one.device, one.config)
            == (type(other), other.training, other.dtype, other.device, {**other.config, "_name_or_path": None})
            for one, other in ((getattr(pipe, name), getattr(whole, name)) for name in PARTS)
        ],
    }
    handle.remove()
    blocks = [x for name in PARTS for block in block_lists(getattr(whole, name)) for x in block.parameters()]
    total = [x for name in PARTS for x in getattr(whole, name).parameters()]
    return {**found, "bytes": (sum(x.nbytes for x in total), sum(x.nbytes for x in blocks))}


@pytest.mark.parametrize(("dtype", "ulysses", "ring"), [("float32", 2, 1), ("bfloat16", 1, 3)])
def test_each_rank_reads_its_part(ranks: RankPool, folder: Path, dtype: str, ulysses: int, ring: int) -> None:
    for found in ranks.run(read_and_whole, folder, dtype, ulysses=ulysses, ring=ring, shard_weights=True):
        assert found["unread"] == [True, True]
        assert found["same"] == [True, True]
        assert found["error"] <= (1e-5 if dtype == "float32" else 2e-2)
        total, blocks = found["bytes"]
        # Each weight begins at a multiple of 256 bytes in what is cut, so parts are not just alike.
        assert found["read"] <= total - blocks + 1.25 * blocks / (ulysses * ring)
        assert found["held"][0] == found["held"][1]


def quantised_by_blocks(mesh: ParallelMesh, folder: Path, is_real: bool) -> dict[str, Any]:
    """Weights that are quantised while they are read, in parts and whole; without torchao by a class of the tests."""
    warnings.simplefilter("error", UserWarning)
    source, kept = resolve_model(folder), vars(sharded_loading).copy()
    if not is_real:
        fakes = {"quantised_weight": lambda _, x: ScaledWeight.of(x), "mark_quantised": lambda *_: None}
        vars(sharded_loading).update({**fakes, "quantization_config": lambda _: None})
        with warnings.catch_warnings():
            whole = load_pipeline(source)
        for path, part in (x for name in PARTS for x in getattr(whole, name).named_modules()):
            if isinstance(part, torch.nn.Linear) and "time_embedder" not in path:  # which the class keeps in float32
                part.weight = ScaledWeight.of(part.weight)
        pipe = load_pipeline(source)
        classes = dict.fromkeys(PARTS, WanTransformer3DModel)
        on: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "quantization": "int8"}
        for name, model in transformers_to_share(classes, str(folder), **on).items():
            setattr(pipe, name, model)
    else:
        warnings.simplefilter("ignore")
        whole = load_pipeline(source, quantization="int8")
        pipe = load_pipeline(source, quantization="int8", shares_weights=True)
    unread = [has_unread_weights(getattr(pipe, name)) for name in PARTS]
    try:
        for name in PARTS:
            read_share(getattr(pipe, name))
    finally:
        vars(sharded_loading).update(kept)
    handle = parallelize(pipe, mesh)
    held, drawn = handle.weight_bytes, draw(pipe)
    handle.remove()
    weights = [[x for name in PARTS for x in getattr(one, name).parameters()] for one in (pipe, whole)]
    restored, wanted = ([leaf for x in of_one for leaf in leaves_of(x)] for of_one in weights)
    same = len(restored) == len(wanted) > len(weights[0]) and all(map(torch.equal, restored, wanted))
    alone = draw(whole)
    handle = parallelize(whole, mesh)
    found = {"held": (held, handle.weight_bytes), "unread": unread}
    handle.remove()
    kinds = [type(getattr(one, name).blocks[0].ffn.net[2].weight) for one in (pipe, whole) for name in PARTS]
    return {**found, "error": relative_error(drawn, alone), "restored": same, "kinds": kinds}


@pytest.mark.parametrize("is_real", [False, *([True] if HAS_TORCHAO else [])])
def test_each_block_is_quantised_as_it_is_read(ranks: RankPool, folder: Path, is_real: bool) -> None:
    for found in ranks.run(quantised_by_blocks, folder, is_real, ulysses=2, shard_weights=True):
        assert found["unread"] == [True, True]
        assert found["held"][0] == found["held"][1]
        assert found["error"] <= 1e-5
        assert found["restored"]
        assert len(set(found["kinds"])) == 1
        assert found["kinds"][0] is not torch.nn.Parameter


def test_what_touches_a_transformer_before_has_it_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", {"owner/wan": folder}.__getitem__)  # from the hub, or its cache
    pipe = load_pipeline(ModelSource(name="owner/wan", location="owner/wan"), shares_weights=True)
    assert pipe.transformer.patch_embedding.weight.device.type == "cpu"
    assert not has_unread_weights(pipe.transformer)
    assert has_unread_weights(pipe.transformer_2)
    read_share(pipe.transformer)
    assert not any(x.is_meta for x in pipe.transformer.parameters())


def rename(path: Path) -> None:
    weights = load_file(path / FILE)
    weights["old.name"] = weights.pop("proj_out.bias")
    save_file(weights, path / FILE)


def reshape(path: Path) -> None:
    weights = load_file(path / FILE)
    weights["proj_out.bias"] = weights["proj_out.bias"][:-1].clone()
    save_file(weights, path / FILE)


def quantise(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (path / "config.json").write_text(json.dumps(config))


def as_pickle(path: Path) -> None:
    torch.save(load_file(path / FILE), path / "diffusion_pytorch_model.bin")
    (path / FILE).unlink()


def cut_off(path: Path) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (rename, "its files have other names than the model has, such as old.name"),
        (reshape, r"proj_out.bias is \(\d+,\) in its files, and \(\d+,\) in the model"),
        (quantise, "they are quantised"),
        (as_pickle, f"there is no {FILE}"),
        (cut_off, "is incomplete"),
    ],
)
def test_what_cannot_be_read_in_parts_is_read_whole_with_a_word(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    for name in PARTS:
        shutil.copytree(folder / "transformer", tmp_path / name)
    damage(tmp_path / "transformer")
    classes = {**dict.fromkeys(PARTS, WanTransformer3DModel), "vae": AutoencoderKLWan, "transformer_3": None}
    with pytest.warns(UserWarning, match=f"all weights of transformer before it keeps its part, since .*{reason}"):
        found = transformers_to_share(classes, str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert list(found) == ["transformer_2"]
