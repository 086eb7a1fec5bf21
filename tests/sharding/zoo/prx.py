"""PRX: pictures attend to themselves and to a text that stays as it is."""

from __future__ import annotations

from typing import Any

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _build(**more: Any) -> Any:
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=20,
        hidden_size=36,
        mlp_ratio=2.0,
        num_heads=3,
        depth=2,
        axes_dim=[6, 6],
        **more,
    )


def _pixels() -> Any:
    return _build(bottleneck_size=10, resolution_embeds=True)


def _inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 10, 14),
        "timestep": draw(2, 2).abs(),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "attention_mask": key_mask((13, 5), 13),
    }


ENTRIES = [
    Entry("PRXTransformer2DModel", _build, _inputs),
    Entry("PRXTransformer2DModel", _pixels, _inputs, variant="resolution embedding"),
]
