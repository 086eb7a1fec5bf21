"""From a name to a pipeline, and the ways in which a name can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from omni_sp import ModelNotFoundError
from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import SHAPES_MODEL, shapes_folder
from omni_sp.testing.models import save_flux_kontext, save_wan

ROOT = Path(__file__).resolve().parents[2]


def refusal(model: Any) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_demo_model_is_a_folder_of_the_package() -> None:
    source = resolve_model(SHAPES_MODEL)
    assert source.name == SHAPES_MODEL
    assert Path(source.location) == shapes_folder()


def test_the_demo_model_says_what_to_draw_with() -> None:
    defaults = resolve_model(SHAPES_MODEL).sampling_defaults
    assert (defaults["height"], defaults["width"]) == (256, 256)
    assert defaults["num_inference_steps"] < 50
    assert defaults["true_cfg_scale"] > 1


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for model in (tmp_path, str(tmp_path)):
        source = resolve_model(model)
        assert source.location == str(tmp_path)
        assert source.sampling_defaults == {}


def test_folders_that_are_no_pipeline(tmp_path: Path) -> None:
    assert "no model_index.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "a single model, not a pipeline" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "names no pipeline class" in refusal(tmp_path)
    assert "is a file of another kind" in refusal(tmp_path / "config.json")
    assert "no folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "model", ["", None, 7, "cat", "./nowhere", "/nowhere", "~/no/where", "a/b/c", "-a/b", "a" * 5000]
)
def test_names_that_are_none(model: Any) -> None:
    assert SHAPES_MODEL in refusal(model)


def test_a_slip_in_the_demo_models_name_is_pointed_at() -> None:
    assert refusal("omni-sp/shape") == f"unknown model 'omni-sp/shape': did you mean {SHAPES_MODEL}?"


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "refused by the hub\nwith details")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "is gated: ask for access at https://huggingface.co/owner/model"),
        (errors.RepositoryNotFoundError, "no model 'owner/model' on the hub"),
        (errors.RemoteEntryNotFoundError, "is no diffusers pipeline"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (ConnectionError, "the hub cannot be reached (refused by the hub with details)"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    def answer(*_: object, **__: object) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    assert message in refusal("owner/model")


def test_a_cached_hub_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/model_index.json")
    source = resolve_model("owner/model")
    assert (source.name, source.location) == ("owner/model", "owner/model")


def test_resolving_imports_no_torch() -> None:
    program = (
        "import sys; from omni_sp.pipelines.load import resolve_model; "
        f"resolve_model({SHAPES_MODEL!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_loads_with_the_right_dtype_and_quietly(
    dtype: str | None, expected: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging as diffusers_logging

    verbosity = diffusers_logging.get_verbosity()
    pipe = load_pipeline(resolve_model(SHAPES_MODEL), dtype=dtype)
    assert type(pipe).__name__ == "QwenImagePipeline"
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {expected}
    assert capfd.readouterr() == ("", "")
    assert diffusers_logging.get_verbosity() == verbosity


def test_damaged_pipelines_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(shapes_folder(), folder, ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded") as caught:
        load_pipeline(resolve_model(folder))
    assert "\n" not in str(caught.value)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ModelNotFoundError, match="NoSuchPipeline"):
        load_pipeline(resolve_model(folder))


def test_every_component_is_reported_before_it_is_read() -> None:
    from diffusers.utils import logging as diffusers_logging

    bars = diffusers_logging.tqdm
    calls: list[tuple[str, int, int]] = []
    load_pipeline(resolve_model(SHAPES_MODEL), on_component=lambda *call: calls.append(call))
    assert calls[0] == ("", 0, 5)
    assert [done for _, done, _ in calls[1:]] == [0, 1, 2, 3, 4]
    assert {name for name, _, _ in calls[1:]} == {"vae", "text_encoder", "transformer", "tokenizer", "scheduler"}
    assert {total for _, _, total in calls} == {5}
    assert diffusers_logging.tqdm is bars


def held(pipe: Any) -> int:
    """Bytes of the pipeline's parameters in memory."""
    modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    return sum(one.nbytes for module in modules for one in module.parameters() if not one.is_meta)


def test_a_process_that_does_not_decode_holds_no_vae(tmp_path: Path) -> None:
    save_wan(tmp_path)
    source = resolve_model(tmp_path)
    pipe, whole = load_pipeline(source, decodes=False), load_pipeline(source)
    assert has_unread_weights(pipe.vae)
    assert held(pipe) == held(whole) - sum(one.nbytes for one in whole.vae.parameters())
    for name in ("dtype", "device", "training"):
        assert getattr(pipe.vae, name) == getattr(whole.vae, name)
    assert dict(pipe.vae.config) == {name: one for name, one in whole.vae.config.items() if name != "_name_or_path"}
    assert type(pipe.vae).__name__ == type(whole.vae).__name__
    assert isinstance(pipe.vae, type(whole.vae))
    assert (pipe.device, pipe.vae_scale_factor_spatial) == (whole.device, whole.vae_scale_factor_spatial)
    call = {"prompt": "a cat walks", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}

    def draw(pipe: Any, output_type: str) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return torch.as_tensor(pipe(**call, generator=generator, output_type=output_type).frames)

    assert torch.equal(draw(pipe, "latent"), draw(whole, "latent"))
    assert has_unread_weights(pipe.vae)
    # What was to be left unread is read where it is needed after all.
    assert torch.equal(draw(pipe, "pt"), draw(whole, "pt"))
    assert type(pipe.vae) is type(whole.vae)
    assert held(pipe) == held(whole)


def test_a_late_read_uses_no_random_numbers_and_keeps_what_was_set() -> None:
    vae = load_pipeline(resolve_model(SHAPES_MODEL), decodes=False, dtype="bfloat16").vae
    vae.enable_tiling()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert {parameter.dtype for parameter in vae.decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.use_tiling
    assert not vae.training


def test_going_elsewhere_reads_the_weights_first() -> None:
    vae = load_pipeline(resolve_model(SHAPES_MODEL), decodes=False).vae
    assert has_unread_weights(vae.to("cpu"))
    moved = vae.to(torch.bfloat16)
    assert moved is vae
    assert {(parameter.dtype, parameter.device.type) for parameter in vae.parameters()} == {(torch.bfloat16, "cpu")}


def test_pipelines_that_encode_pictures_read_everything_at_once(tmp_path: Path) -> None:
    save_flux_kontext(tmp_path)
    pipe = load_pipeline(resolve_model(tmp_path), decodes=False)
    assert not has_unread_weights(pipe.vae)
    assert not any(parameter.is_meta for parameter in pipe.vae.parameters())


def test_weights_that_are_gone_when_they_are_needed_are_an_error_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(shapes_folder(), folder)
    pipe = load_pipeline(resolve_model(folder), decodes=False)
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(
        ModelNotFoundError, match=r"the weights of vae .*left unread until now, cannot be read"
    ) as caught:
        pipe.vae.decode(torch.zeros(1, 8, 1, 4, 4))
    assert "\n" not in str(caught.value)
    assert has_unread_weights(pipe.vae)
