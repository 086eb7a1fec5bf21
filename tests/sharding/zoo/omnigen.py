"""OmniGen: words, pictures to look at, a token of time and the picture to make in one sequence under a causal mask."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw

_TEXT, _PICTURE = 13, 35


def _build() -> Any:
    from diffusers import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=36,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=48,
        num_layers=2,
        pad_token_id=0,
        vocab_size=50,
        max_position_embeddings=256,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0] * 6},
        pos_embed_max_size=16,
    )


def _mask(lengths: tuple[int, ...]) -> torch.Tensor:
    """Texts are padded on the left; they are causal, and the picture sees everything that is no padding."""
    tokens = _TEXT + 1 + _PICTURE
    masks = []
    for length in lengths:
        padding = _TEXT - length
        mask = torch.ones(tokens, tokens).tril()
        mask[-_PICTURE:] = 1
        mask[:, :padding] = 0
        mask[:padding] = 1
        masks.append(mask)
    return torch.stack(masks)


def _inputs() -> Inputs:
    lengths = (13, 5)
    positions = [[0] * (_TEXT - length) + list(range(length + 1 + _PICTURE)) for length in lengths]
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": draw(2, 2).abs(),
        "input_ids": torch.arange(2 * _TEXT).reshape(2, _TEXT) % 50,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": _mask(lengths),
        "position_ids": torch.tensor(positions),
    }


def _picture_inputs() -> Inputs:
    inputs = _inputs()
    inputs["input_img_latents"] = [draw(3, 1, 4, 4, 6)]
    inputs["input_image_sizes"] = {0: [[4, 10]]}
    inputs["attention_mask"][0, 4:10, 4:10] = 1
    return inputs


ENTRIES = [
    Entry("OmniGenTransformer2DModel", _build, _inputs),
    Entry("OmniGenTransformer2DModel", _build, _picture_inputs, variant="picture to look at"),
]
