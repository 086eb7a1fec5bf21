"""The tiny models: every family is saved as users have it, and draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_sp import Omni, OmniDiffusionSamplingParams
from omni_sp.testing.models import MODELS, main

PICTURE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
SIZES = {"a video": {"width": 64, "height": 32, "num_frames": 9}, "a picture": {"width": 64, "height": 48}}
FAMILIES = [family for family, (description, _) in MODELS.items() if "Pipeline" in description]


def run(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as stop:
        return int(str(stop.code or 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_saved_and_draws(family: str, tmp_path: Path) -> None:
    description, _ = MODELS[family]
    if "torchvision" in description and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    assert run(family, str(tmp_path / "tiny")) == 0
    made = next(kind for kind in SIZES if kind in description)
    params: dict[str, Any] = {**SIZES[made], "seed": 3, "num_inference_steps": 2}
    takes_image = "edits" in description or "from a picture" in description
    if family == "flux-kontext":
        params["extra_args"] = {"_auto_resize": False}
    with Omni(tmp_path / "tiny", device="cpu") as omni:
        assert description.startswith(omni.info.capabilities.name)
        prompt = {"prompt": "a red circle", **({"image": PICTURE} if takes_image else {})}
        output = omni.generate(prompt, OmniDiffusionSamplingParams(**params))[0]
    frames = output.videos[0] if made == "a video" else output.images
    assert len(frames) == params.get("num_frames", 1)
    assert frames[0].size == (params["width"], params["height"])
    assert np.asarray(frames[-1]).std() > 1


def test_another_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert [run("llama", str(folder)), run("qwen3", str(folder))] == [0, 0]
    real = tmp_path / "real"
    real.mkdir()
    (real / "model.safetensors").write_bytes(b"weights")
    assert run("llama", str(real)) == 2
    assert "real holds files that this command did not save" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in real.iterdir()] == [("model.safetensors", b"weights")]
    assert run("llama", str(real / "model.safetensors")) == 2
    assert "model.safetensors is a file: name a folder" in capsys.readouterr().err


def test_the_list_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == list(MODELS)
    assert run("--help") == 0
    assert shown.rstrip() in capsys.readouterr().out


def test_an_unknown_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nothing", str(tmp_path / "tiny")) == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert run("qwen-image-edit", str(tmp_path / "tiny")) == 2
    assert "needs torchvision: pip install torchvision" in capsys.readouterr().err
