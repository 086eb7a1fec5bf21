"""The arguments that a pipeline passes to its transformer for one sample (one branch of guidance), at any size.

Tensors whose numbers decide nothing are on the device "meta": they have a shape, and no numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is drawn.

    Attributes:
        height: pixels.
        width: pixels.
        frames: of a video; 1 for a picture.
    """

    height: int
    width: int
    frames: int = 1

    def latent(self, spatial: int, temporal: int = 4) -> tuple[int, int, int]:
        """Frames, height and width of a latent that has one value for so many pixels and frames."""
        return (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


def _tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _text(tokens: int, channels: int) -> Inputs:
    return {"encoder_hidden_states": _tensor(1, tokens, channels), "timestep": _tensor(1)}


def _mask(tokens: int, valid: int | None = None) -> torch.Tensor:
    """All tokens, or the first so many."""
    return (torch.arange(tokens) < (valid or tokens))[None]


def _latent(*shape: int) -> Inputs:
    return {"hidden_states": _tensor(1, *shape)}


def qwen_image(size: Size) -> Inputs:
    _, height, width = size.latent(16)
    return {
        **_latent(height * width, 64),
        **_text(128, 3584),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, height, width)]],
    }


def flux(size: Size, text: int = 512) -> Inputs:
    tokens = math.prod(size.latent(16)[1:])
    return {
        **_latent(tokens, 64),
        **_text(text, 4096),
        "pooled_projections": _tensor(1, 768),
        "guidance": _tensor(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def chroma(size: Size) -> Inputs:
    inputs = flux(size)
    del inputs["pooled_projections"], inputs["guidance"]
    return {**inputs, "attention_mask": _mask(512 + inputs["hidden_states"].shape[1]).float()}


def flux2(size: Size) -> Inputs:
    tokens = math.prod(size.latent(16)[1:])
    return {
        **_latent(tokens, 128),
        **_text(512, 15360),
        "guidance": _tensor(1),
        "img_ids": torch.zeros(1, tokens, 4),
        "txt_ids": torch.zeros(1, 512, 4),
    }


def sd3(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8)[1:]), **_text(77 + 256, 4096), "pooled_projections": _tensor(1, 2048)}


def z_image(size: Size) -> Inputs:
    return {"x": [_tensor(16, 1, *size.latent(8)[1:])], "t": _tensor(1), "cap_feats": [_tensor(128, 2560)]}


def hidream(size: Size) -> Inputs:
    return {
        **_latent(16, *size.latent(8)[1:]),
        "timesteps": _tensor(1),
        "encoder_hidden_states_t5": _tensor(1, 128, 4096),
        "encoder_hidden_states_llama3": _tensor(32, 1, 128, 4096),
        "pooled_embeds": _tensor(1, 2048),
    }


def wan(size: Size, channels: int = 16) -> Inputs:
    return {**_latent(channels, *size.latent(8)), **_text(512, 4096)}


def wan_5b(size: Size) -> Inputs:
    frames, height, width = size.latent(16)
    tokens = frames * (height // 2) * (width // 2)
    return {**_latent(48, frames, height, width), **_text(512, 4096), "timestep": _tensor(1, tokens)}


def wan_vace(size: Size) -> Inputs:
    return {
        **wan(size),
        "control_hidden_states": _tensor(1, 96, *size.latent(8)),
        "control_hidden_states_scale": torch.ones(8),
    }


def skyreels(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8)), **_text(512, 4096)}


def hunyuan_video(size: Size) -> Inputs:
    return {
        **_latent(16, *size.latent(8)),
        **_text(256, 4096),
        "encoder_attention_mask": _mask(256, 60).long(),
        "pooled_projections": _tensor(1, 768),
        "guidance": _tensor(1),
    }


def hunyuan_video_15(size: Size) -> Inputs:
    return {
        **_latent(65, *size.latent(16)),
        **_text(1000, 3584),
        "encoder_attention_mask": _mask(1000, 120).long(),
        "encoder_hidden_states_2": _tensor(1, 256, 1472),
        "encoder_attention_mask_2": _mask(256, 20).long(),
        "image_embeds": torch.zeros(1, 729, 1152),  # no image
    }


def hunyuan_image(size: Size) -> Inputs:
    return {
        **_latent(64, *size.latent(32)[1:]),
        **_text(1000, 3584),
        "encoder_attention_mask": _mask(1000, 120).long(),
        "encoder_hidden_states_2": _tensor(1, 128, 1472),
        "encoder_attention_mask_2": _mask(128, 20).long(),
    }


def ltx(size: Size) -> Inputs:
    frames, height, width = size.latent(32, 8)
    return {
        **_latent(frames * height * width, 128),
        **_text(256, 4096),
        "encoder_attention_mask": _mask(256, 100),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx2(size: Size) -> Inputs:
    frames, height, width = size.latent(32, 8)
    sound = size.frames * 25 // 24
    return {
        **_latent(frames * height * width, 128),
        **_text(1024, 3840),
        "audio_hidden_states": _tensor(1, sound, 128),
        "audio_encoder_hidden_states": _tensor(1, 1024, 3840),
        "encoder_attention_mask": _mask(1024),
        "audio_encoder_attention_mask": _mask(1024),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": sound,
    }


def cogvideox(size: Size) -> Inputs:
    frames, height, width = size.latent(8)
    return {**_text(226, 4096), "hidden_states": _tensor(1, frames, 16, height, width)}


def cogvideox_5b(size: Size) -> Inputs:
    frames, height, width = size.latent(16)
    rotary = _tensor(frames * height * width, 64)
    return {**cogvideox(size), "image_rotary_emb": (rotary, rotary)}


def mochi(size: Size) -> Inputs:
    return {**_latent(12, *size.latent(8, 6)), **_text(256, 4096), "encoder_attention_mask": _mask(256, 60)}


def sana(size: Size) -> Inputs:
    return {**_latent(32, *size.latent(32)[1:]), **_text(300, 2304), "encoder_attention_mask": _mask(300, 100).long()}


def sana_video(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8)), **_text(300, 2304), "encoder_attention_mask": _mask(300, 100).long()}


def cosmos(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8)), **_text(512, 1024), "fps": 16}


def cosmos_1(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8, 8)), **_text(512, 1024), "fps": 24}


def kandinsky_5(size: Size) -> Inputs:
    frames, height, width = size.latent(8)
    return {
        **_text(256, 3584),
        "hidden_states": _tensor(1, frames, height, width, 33),
        "pooled_projections": _tensor(1, 768),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        "text_rope_pos": torch.arange(256),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def lumina_2(size: Size) -> Inputs:
    return {**_latent(16, *size.latent(8)[1:]), **_text(256, 2304), "encoder_attention_mask": _mask(256, 100).long()}


def auraflow(size: Size) -> Inputs:
    return {**_latent(4, *size.latent(8)[1:]), **_text(256, 2048)}


def cogview_4(size: Size) -> Inputs:
    sizes = {name: _tensor(1, 2) for name in ("original_size", "target_size", "crop_coords")}
    return {**_latent(16, *size.latent(8)[1:]), **_text(224, 4096), **sizes}


def pixart(size: Size) -> Inputs:
    return {
        **_latent(4, *size.latent(8)[1:]),
        **_text(300, 4096),
        "encoder_attention_mask": _mask(300, 100).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
