"""The bytes of weights on each rank, at rest and at the peak of a call.

``python -m benchmarks.weights [--ranks N ...]``

The first table has transformers alone, whole and with ``shard_weights``: at the peak of a forward a rank holds, beside
what it holds at rest, the block that runs and the one that is gathered. The second has whole pictures as `Omni` draws
them, with each encoder on one rank, the weights sharded, and the VAE on all ranks: beside what is counted stands what
follows from the sizes of the parts.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.engine.messages import Call
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.pipelines.lazy_components import has_unread_weights
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.parallelize import transformers_of
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL
from omni_sp.pipelines.shared_encoders import encoder_names
from omni_sp.requests import engine_options
from omni_sp.sharding.replay import block_lists
from omni_sp.sharding.weights import BlockWeights, held_bytes
from omni_sp.testing.components import clip_text_encoder, tokenizer, transformer
from omni_sp.testing.live_bytes import LiveBytes
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise

DEMO, LARGER, LARGER_PICTURE = "the demo model", "FLUX of 16 + 16 blocks", "FLUX of 16 + 16 blocks, T5 of 8 layers"
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {"text_encoder_parallel": False, "vae_parallel": False},
    "encoders on one rank": {"vae_parallel": False},
    "and weights sharded": {"vae_parallel": False, "shard_weights": True},
    "and the VAE on all": {"vae_parallel": True, "shard_weights": True},
}


@dataclass
class Held:
    """What one rank holds of a pipeline.

    Attributes:
        parts: kind of component ("transformer", "encoders", "vae") -> bytes of its weights at rest.
        peak: bytes of all tensors at the peak of a call, weights among them.
        largest_pair: bytes of the two neighbouring blocks that have most, where weights are sharded.
    """

    parts: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    largest_pair: int = 0

    @property
    def rest(self) -> int:
        """Bytes of all weights at rest."""
        return sum(self.parts.values())


def larger_transformer() -> Any:
    """A FLUX whose weights are not to be neglected."""
    return transformer(
        "FluxTransformer2DModel", num_layers=16, num_single_layers=16, num_attention_heads=12, joint_attention_dim=256
    )


def save_larger(folder: Path) -> None:
    """Save a pipeline whose parts all have weights: FLUX with a T5 and a VAE of some millions."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import T5Config, T5EncoderModel

    words, long = tokenizer(16), tokenizer(512)
    t5 = T5Config(vocab_size=len(long), d_model=256, d_kv=64, d_ff=2048, num_layers=8, num_heads=8)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), latent_channels=4, shift_factor=0.1, scaling_factor=0.4, **blocks
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=randomise(vae),
        text_encoder=clip_text_encoder(words, 20),
        tokenizer=words,
        text_encoder_2=randomise(T5EncoderModel(t5)),
        tokenizer_2=long,
        transformer=randomise(larger_transformer()),
    ).save_pretrained(folder)


def measure_picture(mesh: ParallelMesh, model: str) -> Held:
    """What this rank holds at rest after a picture of 256 x 256, and at the peak of the next one."""
    warnings.simplefilter("ignore")  # of libraries
    options = engine_options(model, mesh.config, device="cpu")
    runner = PipelineRunner(options, "cpu", rank=mesh.rank, decodes=mesh.rank == 0 or mesh.config.vae_parallel is True)
    runner.parallelize(mesh)
    arguments: dict[str, Any] = {"prompt": "a red circle", "height": 256, "width": 256, "num_inference_steps": 1}
    if model == SHAPES_MODEL:
        arguments = {**SHAPES_CALL, **arguments}
    call = Call(request_id="x", arguments={**arguments, "output_type": "np"}, seeds=(1,))
    runner.run(call, answers=mesh.rank == 0)
    held = Held(_held_parts(runner._pipe), largest_pair=_largest_pair(runner._pipe))
    with LiveBytes() as live:
        runner.run(call, answers=mesh.rank == 0)
    held.peak = held.rest + live.peak
    return held


def _held_parts(pipe: Any) -> dict[str, int]:
    names = {name for name, _ in transformers_of(pipe)}
    parts = {"transformer": 0, "encoders": 0, "vae": 0}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module) and not has_unread_weights(component):
            kind = "transformer" if name in names else "encoders" if encoder_names([name]) else "vae"
            parts[kind] += held_bytes(component)
    return parts


def _largest_pair(pipe: Any) -> int:
    sizes = [
        sum(x.nbytes for x in block.parameters()) for _, one in transformers_of(pipe) for block in block_lists(one)
    ]
    return max(map(sum, itertools.pairwise(sizes)), default=0)


def formulas(name: str, whole: list[Held], blocks: int, encoder_bytes: list[int]) -> list[tuple[int, int]]:
    """Bytes of each rank at rest and at the peak, from the sizes of the parts.

    The tensors of encoding count on every rank, so that the peak of one that does not run the largest encoder is less.

    Args:
        name: of ``LAYOUTS``.
        whole: what was counted where every rank holds everything but the VAE, which only rank 0 has.
        blocks: bytes of the transformer's blocks.
        encoder_bytes: of each encoder, in the order in which ranks get them.
    """
    count, options = len(whole), LAYOUTS[name]
    found = []
    decode, denoise = whole[0].peak - whole[0].rest, whole[1].peak - whole[1].rest
    for rank in range(count):
        parts = whole[rank].parts
        is_sharded, is_shared = options.get("shard_weights", False), options["vae_parallel"]
        model = parts["transformer"] - (blocks - blocks // count if is_sharded else 0)
        encoders = sum(encoder_bytes)
        if options.get("text_encoder_parallel", True):
            encoders = sum(size for index, size in enumerate(encoder_bytes) if index % count == rank)
        vae = whole[0].parts["vae"] if rank == 0 or is_shared else 0
        rest = model + encoders + vae
        stages = [denoise + (whole[rank].largest_pair if is_sharded else 0)]
        if rank == 0 or is_shared:
            stages.append(decode // count if is_shared else decode)
        found.append((rest, rest + max(stages)))
    return found


def _sizes(_mesh: ParallelMesh, model: str) -> tuple[int, list[int]]:
    """Bytes of the transformer's blocks, and of each encoder."""
    pipe = load_pipeline(resolve_model(model))
    modules = [block for _, one in transformers_of(pipe) for block in block_lists(one)]
    blocks = sum(x.nbytes for block in modules for x in block.parameters())
    encoders = [pipe.components[name] for name in encoder_names(pipe.components)]
    return blocks, [held_bytes(encoder) for encoder in encoders if encoder is not None]


def picture_table(pool: RankPool, title: str, model: str, count: int) -> Iterator[str]:
    """The rows of one model, a line for each of ``LAYOUTS``."""
    blocks, encoders = pool.run(_sizes, model)[0]
    whole: list[Held] = []
    for name, options in LAYOUTS.items():
        held = pool.run(measure_picture, model, ulysses=count, **options)
        whole = whole or held
        expected = formulas(name, whole, blocks, encoders)
        columns = [
            [one.rest for one in held],
            [rest for rest, _ in expected],
            [one.peak for one in held],
            [peak for _, peak in expected],
        ]
        shown = " | ".join(", ".join(f"{value / 1e6:.1f}" for value in column) for column in columns)
        yield f"| {title} | {name} | {shown} |"


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
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="at least 2")
    parser.add_argument("--pictures", action="store_true", help="the second table alone")
    options = parser.parse_args()
    counts = options.ranks
    pool = RankPool(max(counts))
    if not options.pictures:
        print("| model | ranks | whole | sharded, by rank | at the peak, by rank |\n|---|---|---|---|---|")
    for name in () if options.pictures else (DEMO, LARGER):
        for count in counts:
            whole = pool.run(measure, name, ulysses=count)
            sharded = pool.run(measure, name, ulysses=count, shard_weights=True)
            shown = [", ".join(f"{found[place] / 1e3:.0f}" for found in sharded) for place in (0, 1)]
            print(f"| {name} | {count} | {whole[0][0] / 1e3:.0f} | {shown[0]} | {shown[1]} |")
    print(
        "\n| model | what a rank holds | weights | by the formula | at the peak | by the formula |"
        "\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_larger(Path(folder))
        for title, model in ((DEMO, SHAPES_MODEL), (LARGER_PICTURE, folder)):
            for count in counts:
                for line in picture_table(pool, f"{title}, {count} ranks", model, count):
                    print(line, flush=True)
    pool.close()


if __name__ == "__main__":
    main()
