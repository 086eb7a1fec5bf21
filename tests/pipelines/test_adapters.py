"""LoRA adapters that calls put on and off: exact on all ranks, without a trace afterwards, and refused by name."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_sp import ConfigError, DiffusionParallelConfig, Omni, ParallelMesh, SamplingParamsError, ShardingError
from omni_sp import OmniDiffusionSamplingParams as Params
from omni_sp.cli import main
from omni_sp.engine.messages import Call
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.pipelines.adapters import LoraAdapters
from omni_sp.pipelines.metadata import read_settings
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL, shapes_folder
from omni_sp.requests import engine_options
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error

pytest.importorskip("peft", reason="peft is not installed: pip install '.[lora]'")

WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {**SHAPES_CALL, "height": 80, "width": 48, "num_inference_steps": 2, "output_type": "pt"}
NOTHING, STYLE, BOTH = (), (("style", 1.0),), (("light", 1.0), ("style", 1.0))
MIXED = (("light", -1.0), ("style", 2.0))


def save_lora(folder: Path, seed: int) -> Path:
    """A LoRA for some layers of the demo model, saved by diffusers."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = plain_pipe()
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "proj_out"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


def plain_pipe() -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(shapes_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: str(save_lora(folder / name, seed)) for seed, name in enumerate(("style", "light"))}


def draw(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(PROMPT, generator=torch.manual_seed(11), **SMALL).images)


def by_diffusers(loras: dict[str, str], scales: tuple[tuple[str, float], ...]) -> torch.Tensor:
    """The picture of a pipeline that has just these adapters, by diffusers' own means."""
    pipe = plain_pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, _ in scales:
            pipe.load_lora_weights(loras[name], adapter_name=name)
        if scales:
            pipe.set_adapters([name for name, _ in scales], [scale for _, scale in scales])
    return draw(pipe)


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    """The model's own weights, by the names that they have without adapters."""
    return {
        name.replace(".base_layer", ""): weight.clone()
        for name, weight in pipe.transformer.state_dict().items()
        if "lora_" not in name
    }


@pytest.fixture(scope="module")
def wanted(loras: dict[str, str]) -> dict[Any, torch.Tensor]:
    return {scales: by_diffusers(loras, scales) for scales in (NOTHING, STYLE, BOTH, MIXED)}


def drawn_on_rank(mesh: ParallelMesh, loras: dict[str, str], turns: list[Any]) -> tuple[list[Any], bool]:
    """The pictures of calls in turn; whether the weights are those of the file after a hundred switches."""
    warnings.simplefilter("ignore")
    options = engine_options(SHAPES_MODEL, mesh.config, device="cpu", lora=loras)
    runner = PipelineRunner(options, "cpu")
    assert runner.parallelize(mesh).capabilities.adapters == ("style", "light")

    def call(scales: Any) -> torch.Tensor:
        done = runner.run(Call(request_id="x", arguments={"prompt": PROMPT, **SMALL}, seeds=(11,), adapters=scales))
        assert done.result is not None
        return torch.as_tensor(done.result.images[0])[None]

    pictures = [call(scales) for scales in turns]
    for number in range(100):
        runner._adapters.apply((("style", number / 7), ("light", 1.0))[: number % 3])
    pictures.append(call(turns[-1]))
    before, after = weights_of(plain_pipe()), weights_of(runner._pipe)
    is_same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    runner.close()
    return pictures, is_same


@pytest.mark.parametrize(("ulysses", "shard_weights"), [(1, False), (2, False), (2, True)])
def test_each_call_has_its_own_adapters(
    ranks: RankPool, loras: dict[str, str], wanted: dict[Any, torch.Tensor], ulysses: int, shard_weights: bool
) -> None:
    turns = [NOTHING, STYLE, BOTH, NOTHING, STYLE, MIXED]
    assert relative_error(wanted[STYLE], wanted[NOTHING]) > 1e-2
    assert relative_error(wanted[BOTH], wanted[STYLE]) > 1e-2
    assert relative_error(wanted[MIXED], wanted[BOTH]) > 1e-2
    for pictures, is_same in ranks.run(drawn_on_rank, loras, turns, ulysses=ulysses, shard_weights=shard_weights):
        for picture, scales in zip(pictures, [*turns, turns[-1]], strict=True):
            assert relative_error(picture, wanted[scales]) <= 1e-4, scales
        assert torch.equal(pictures[0], pictures[3])
        assert torch.equal(pictures[1], pictures[4])
        assert torch.equal(pictures[5], pictures[6])
        assert is_same


# What cannot be put on


def broken(folder: Path, good: str, kind: str) -> Path:
    """A copy of an adapter that does not fit."""
    weights = load_file(Path(good) / WEIGHTS)
    match kind:
        case "no layer":
            weights = {name.replace("transformer_blocks", "blocks_of_another"): one for name, one in weights.items()}
        case "other shapes":
            weights = {name: torch.cat([one, one], -1).contiguous() for name, one in weights.items()}
        case "one layer more":
            more = {name.replace("blocks.0", "blocks.77"): one for name, one in weights.items() if "blocks.0" in name}
            weights |= {name: one.clone() for name, one in more.items()}
        case "no LoRA":
            weights = {"x": torch.ones(2)}
        case "nothing there":
            return folder
    folder.mkdir()
    save_file(weights, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("kind", ["no layer", "other shapes", "one layer more", "no LoRA", "nothing there"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, loras: dict[str, str], kind: str) -> None:
    path = broken(tmp_path / "bad", loras["style"], kind)
    with pytest.raises(ConfigError, match=r"the LoRA adapter 'wrong': .*bad"):
        LoraAdapters(plain_pipe(), {"wrong": str(path)}, ParallelMesh(DiffusionParallelConfig()))


def test_an_adapter_may_be_a_file(tmp_path: Path, loras: dict[str, str], wanted: dict[Any, torch.Tensor]) -> None:
    file = shutil.copy(Path(loras["style"]) / WEIGHTS, tmp_path / "any_name.safetensors")
    pipe = plain_pipe()
    adapters = LoraAdapters(pipe, {"style": str(file)}, ParallelMesh(DiffusionParallelConfig()))
    assert torch.equal(draw(pipe), wanted[NOTHING])
    adapters.apply(STYLE)
    assert relative_error(draw(pipe), wanted[STYLE]) <= 1e-6


def refusal_on_rank(mesh: ParallelMesh, paths: list[str]) -> str:
    warnings.simplefilter("ignore")
    try:
        LoraAdapters(plain_pipe(), {"style": paths[mesh.rank]}, mesh)
    except (ConfigError, ShardingError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def test_all_ranks_have_the_same_adapter_or_all_refuse_it(ranks: RankPool, tmp_path: Path, loras: Any) -> None:
    missing, same = [loras["style"], str(tmp_path / "missing")], [loras["style"]] * 2
    found = ranks.run(refusal_on_rank, missing, ulysses=2)
    assert len(set(found)) == 1
    assert found[0].startswith("ConfigError: the LoRA adapter 'style' on ranks [1]: ")
    found = ranks.run(refusal_on_rank, [loras["style"], loras["light"]], ulysses=2)
    assert len(set(found)) == 1
    assert "ranks [1] have other weights of the LoRA adapter 'style'" in found[0]
    assert ranks.run(refusal_on_rank, same, ulysses=2) == ["taken"] * 2


def test_omni_takes_adapters_by_name(loras: dict[str, str], wanted: dict[Any, torch.Tensor]) -> None:
    small = {name: SMALL[name] for name in ("height", "width", "num_inference_steps", "output_type")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Omni(SHAPES_MODEL, device="cpu", lora=loras) as omni:
            (output,) = omni.generate(PROMPT, Params(seed=11, lora=[("style", 2), ("light", -1.0)], **small))
            with pytest.raises(SamplingParamsError, match="no LoRA adapter 'stile'; did you mean style") as caught:
                omni.generate(PROMPT, Params(lora="stile", **small))
            assert caught.value.param == "lora"
    assert relative_error(torch.as_tensor(output.images[0])[None], wanted[MIXED]) <= 1e-4
    assert output.settings["lora"] == "light=-1, style=2"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("style.safetensors", "give a dict"),
        ({"a b": "x"}, "no name for an adapter"),
        ({"a": ""}, "give a folder"),
        ({"a": 1}, "give a folder"),
    ],
)
def test_what_names_no_adapters(lora: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options(SHAPES_MODEL, lora=lora)


def test_the_command_line_draws_with_them(loras: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    small = ["--height", "80", "--width", "48", "--num-inference-steps", "1", "--seed", "1", "--device", "cpu"]
    words = ["generate", "--prompt", PROMPT, *small, "--output", str(file)]
    assert main([*words, "--lora", f"style={loras['style']}@0.5", "--lora", f"light={loras['light']}"]) == 0
    assert read_settings(file)["lora"] == "light=1, style=0.5"
