"""Z-Image: lists of pictures and texts of different sizes, padded to a multiple of 32 tokens each."""

from __future__ import annotations

from typing import Any

from omni_sp.testing.components import transformer
from tests.sharding.zoo.entry import Entry, Inputs, draw


def _build() -> Any:
    return transformer("ZImageTransformer2DModel")


def _omni() -> Any:
    # An absent picture is replaced by tokens of 64 channels, whatever the model: 16 channels in patches of 2 x 2.
    return transformer("ZImageTransformer2DModel", in_channels=16, siglip_feat_dim=12)


def _inputs() -> Inputs:
    return {
        "x": [draw(1, 4, 1, 10, 14), draw(2, 4, 1, 10, 14)],
        "t": draw(3, 2).abs(),
        "cap_feats": [draw(4, 13, 20), draw(5, 37, 20)],
    }


def _control_inputs() -> Inputs:
    # 35 picture tokens become 64, and the longer text becomes 64.
    return _inputs() | {"controlnet_block_samples": {0: draw(6, 2, 128, 36)}}


def _omni_inputs() -> Inputs:
    return {
        "x": [[draw(1, 16, 1, 6, 10), draw(2, 16, 1, 10, 14)], [None, draw(3, 16, 1, 10, 14)]],
        "t": draw(4, 2).abs(),
        "cap_feats": [[draw(5, 13, 20), draw(6, 5, 20)], [draw(7, 7, 20), draw(8, 37, 20)]],
        "siglip_feats": [[draw(9, 3, 5, 12), None], [None, None]],
        "image_noise_mask": [[0, 1], [0, 1]],
    }


ENTRIES = [
    Entry("ZImageTransformer2DModel", _build, _inputs),
    Entry("ZImageTransformer2DModel", _build, _control_inputs, variant="controlnet"),
    Entry("ZImageTransformer2DModel", _omni, _omni_inputs, variant="several pictures"),
]
