"""The bytes of a transformer's weights on each rank: whole, and sharded, at rest and at the peak of a forward.

``python -m benchmarks.weights [--ranks N]``

At the peak of a forward a rank holds, beside what it holds at rest, the block that runs and the one that is gathered.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL
from omni_sp.sharding.weights import BlockWeights, held_bytes
from omni_sp.testing.components import transformer
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise

DEMO, LARGER = "the demo model", "FLUX of 16 + 16 blocks"


def model_and_call(name: str) -> tuple[Any, Any]:
    """A model, and one call of it."""
    if name == DEMO:
        pipe = load_pipeline(resolve_model(SHAPES_MODEL))
        pipe.set_progress_bar_config(disable=True)
        call = {**SHAPES_CALL, "height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
        return pipe, lambda: pipe("a red circle", **call, generator=torch.Generator().manual_seed(0))
    model = randomise(
        transformer("FluxTransformer2DModel", num_layers=16, num_single_layers=16, num_attention_heads=12)
    )
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, model.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, model.config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=generator),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, lambda: model(**inputs)


def measure(mesh: ParallelMesh, name: str) -> tuple[int, int]:
    """Bytes at rest, and at the peak of a forward."""
    model, call = model_and_call(name)
    handle = parallelize(model, mesh)
    peak = rest = handle.weight_bytes
    loaded = BlockWeights.loaded

    @contextmanager
    def watched(weights: BlockWeights) -> Iterator[None]:
        nonlocal peak
        with loaded(weights):
            following = 0 if weights.following is None else weights.following.num_bytes
            peak = max(peak, held_bytes(getattr(model, "transformer", model)) + following)
            yield

    with torch.no_grad(), patch.object(BlockWeights, "loaded", watched):
        call()
    assert handle.weight_bytes == rest
    handle.remove()
    return rest, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    counts = parser.parse_args().ranks
    pool = RankPool(max(counts))
    print("| model | ranks | whole | sharded, by rank | at the peak, by rank |\n|---|---|---|---|---|")
    for name in (DEMO, LARGER):
        for count in counts:
            whole = pool.run(measure, name, ulysses=count)
            sharded = pool.run(measure, name, ulysses=count, shard_weights=True)
            shown = [", ".join(f"{found[place] / 1e3:.0f}" for found in sharded) for place in (0, 1)]
            print(f"| {name} | {count} | {whole[0][0] / 1e3:.0f} | {shown[0]} | {shown[1]} |")
    pool.close()


if __name__ == "__main__":
    main()
