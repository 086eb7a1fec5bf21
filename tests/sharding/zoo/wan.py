"""Wan and its kin: VACE, ChronoEdit, SkyReels-V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_sp.testing.components import TRANSFORMERS
from tests.sharding.zoo.entry import Entry, Inputs, draw

_CONFIG = TRANSFORMERS["WanTransformer3DModel"]
IMAGE: dict[str, Any] = {"image_dim": 28, "added_kv_proj_dim": 72}


def build_wan(name: str, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        import diffusers

        return getattr(diffusers, name)(**{**_CONFIG, **changes})

    return build


def _inputs(text: int = 13) -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 3, 6, 10),
        "timestep": torch.tensor([600, 250]),
        "encoder_hidden_states": draw(2, 2, text, 20),
        "return_dict": False,
    }


def _timestep_per_token() -> Inputs:
    """Frames that are given have timestep 0, all others the step's (Wan 2.2 TI2V)."""
    timestep = torch.full((2, 45), 600)
    timestep[:, :15] = 0
    return {**_inputs(), "timestep": timestep}


def _image() -> Inputs:
    """The text is 512 tokens long wherever there is an image: what lies before those is the image."""
    return {**_inputs(text=512), "encoder_hidden_states_image": draw(3, 2, 11, 28)}


def _first_and_last() -> Inputs:
    """Two images, whose tokens have positions of their own."""
    return {**_inputs(text=512), "encoder_hidden_states_image": draw(3, 4, 11, 28)}


def _vace() -> Inputs:
    return {
        **_inputs(),
        "control_hidden_states": draw(4, 2, 12, 3, 6, 10),
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
    }


def _vace_shorter() -> Inputs:
    """A control video shorter than the video itself is filled up with zeros."""
    return {**_vace(), "control_hidden_states": draw(4, 2, 12, 2, 6, 10)}


def _diffusion_forcing() -> Inputs:
    """A timestep for each frame."""
    return {
        **_inputs(),
        "timestep": torch.tensor([[0, 250, 600], [250, 600, 999]]),
        "enable_diffusion_forcing": True,
    }


def _frames_per_second() -> Inputs:
    """The model takes them for one sample only."""
    inputs = {**_diffusion_forcing(), "fps": [1]}
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        inputs[name] = inputs[name][:1]
    return inputs


def _blocks_of_frames() -> Inputs:
    return {
        **_diffusion_forcing(),
        "hidden_states": draw(1, 2, 4, 4, 6, 10),
        "timestep": torch.tensor([[0, 0, 250, 250], [250, 250, 600, 600]]),
    }


_VACE: dict[str, Any] = {"vace_layers": [0, 1], "vace_in_channels": 12}

ENTRIES = [
    Entry("WanTransformer3DModel", build_wan("WanTransformer3DModel"), _inputs),
    Entry("WanTransformer3DModel", build_wan("WanTransformer3DModel"), _timestep_per_token, "timestep per token"),
    Entry("WanTransformer3DModel", build_wan("WanTransformer3DModel", **IMAGE), _image, "image"),
    Entry(
        "WanTransformer3DModel",
        build_wan("WanTransformer3DModel", **IMAGE, pos_embed_seq_len=22),
        _first_and_last,
        "first and last image",
    ),
    Entry("WanVACETransformer3DModel", build_wan("WanVACETransformer3DModel", **_VACE), _vace),
    Entry("WanVACETransformer3DModel", build_wan("WanVACETransformer3DModel", **_VACE), _vace_shorter, "short control"),
    Entry("ChronoEditTransformer3DModel", build_wan("ChronoEditTransformer3DModel", **IMAGE), _image),
    Entry("SkyReelsV2Transformer3DModel", build_wan("SkyReelsV2Transformer3DModel"), _inputs),
    Entry("SkyReelsV2Transformer3DModel", build_wan("SkyReelsV2Transformer3DModel", **IMAGE), _image, "image"),
    Entry(
        "SkyReelsV2Transformer3DModel",
        build_wan("SkyReelsV2Transformer3DModel", inject_sample_info=True),
        _frames_per_second,
        "frames per second",
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        build_wan("SkyReelsV2Transformer3DModel"),
        _diffusion_forcing,
        "diffusion forcing",
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        build_wan("SkyReelsV2Transformer3DModel", num_frame_per_block=2),
        _blocks_of_frames,
        "blocks of frames",
    ),
]
