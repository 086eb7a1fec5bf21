"""One rank's program of a U x R job on one device, at real size: what a rank computes, and what its exchanges add.

python -m benchmarks.rank_program --model qwen-image-2048 --ulysses 8 --bandwidth 300
python -m benchmarks.rank_program --model qwen-image-2048 --whole --gpu H800      # whole pictures on up to 8 of them

A fake process group replaces the other ranks: shapes, kernels and packing are real, nothing is exchanged. The
exchange is added from the bytes that this rank sends over a stated bandwidth, so the step times printed for several
ranks are *projected*. Weights are random. A few layers are timed and scaled up: time is linear in layers.

``--whole`` projects whole pictures, with guidance and the VAE over the ranks, beside what others have published: by
the planner, from a forward measured on this GPU, or, for another one (``--gpu``), from a published run on one GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks.interleaved import Timing, add_output_options, report, save, write
from benchmarks.whole_pictures import as_table, machine_for, project
from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.mesh import Axis
from omni_sp.planner import model_cost
from omni_sp.planner.machines import machine_of_device


@dataclass(frozen=True)
class Workload:
    """A model at its real size.

    Attributes:
        layers: kinds of layers, and how many the whole model has of each.
        build: makes a model with so many layers of each kind.
        inputs: makes the arguments of one forward.
        published: speed-ups that others have published for it, by number of ranks.
        planned: the planner's name of the model, and its height, width and frames.
    """

    layers: dict[str, int]
    build: Callable[[dict[str, int]], Any]
    inputs: Callable[[], dict[str, Any]]
    published: dict[int, float]
    planned: tuple[str, int, int, int | None]


def qwen_image(side: int, published: dict[int, float], width: int = 24, layers: int = 60) -> Workload:
    """Qwen-Image with ``side`` x ``side`` picture tokens and 128 text tokens."""

    def build(counts: dict[str, int]) -> Any:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(num_layers=counts["blocks"], num_attention_heads=width)

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, 128, 3584),
            "timestep": torch.full((1,), 0.6),
            "img_shapes": [[(1, side, side)]],
        }

    return Workload({"blocks": layers}, build, inputs, published, ("Qwen-Image", side * 16, side * 16, None))


def flux(side: int, published: dict[int, float]) -> Workload:
    """FLUX.1-dev with ``side`` x ``side`` picture tokens and 512 text tokens."""

    def build(counts: dict[str, int]) -> Any:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            guidance_embeds=True, num_layers=counts["double"], num_single_layers=counts["single"]
        )

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.full((1,), 0.6),
            "guidance": torch.full((1,), 3.5),
            "img_ids": torch.zeros(side * side, 3),
            "txt_ids": torch.zeros(512, 3),
        }

    planned = ("FLUX.1-dev", side * 16, side * 16, None)
    return Workload({"double": 19, "single": 38}, build, inputs, published, planned)


def wan(height: int, width: int, published: dict[int, float]) -> Workload:
    """Wan2.1-14B, 81 frames (21 in the latent), 512 text tokens."""

    def build(counts: dict[str, int]) -> Any:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(num_layers=counts["blocks"])

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 21, height // 8, width // 8),
            "timestep": torch.full((1,), 600.0),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    return Workload({"blocks": 40}, build, inputs, published, ("Wan2.2-T2V-A14B", height, width, 81))


WORKLOADS: dict[str, Workload] = {
    "qwen-image-2048": qwen_image(128, {2: 1.73, 4: 2.84, 8: 3.65}),
    "qwen-image-1024": qwen_image(64, {2: 1.51, 4: 1.94}),
    "flux-dev-1024": flux(64, {2: 1.60, 4: 2.64}),
    "flux-dev-2048": flux(128, {}),
    "flux-dev-4096": flux(256, {}),
    "wan-14b-720p": wan(720, 1280, {}),
    "wan-14b-480p": wan(480, 832, {8: 6.9}),
    "tiny": qwen_image(8, {}, width=2, layers=2),  # to see that this program runs, on any machine
}


def pretend_all_ranks_alike(values: Sequence[int], axis: Axis) -> list[tuple[int, ...]]:
    """What the ranks would answer where every length is divided evenly: the same as this one."""
    return [tuple(values)] * axis.size


def forward_seconds(model: Any, inputs: dict[str, Any], rounds: int) -> float:
    """Median seconds of a forward."""
    seconds = []
    for number in range(-2, rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 0:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Measured:
    """Seconds of a whole forward, and the bytes that this rank sends in it."""

    seconds: float
    bytes: float


def measure(workload: Workload, config: DiffusionParallelConfig, options: argparse.Namespace) -> Measured:
    """Time few layers, and scale up to the whole model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)

    def once(counts: dict[str, int]) -> Measured:
        with torch.device(device):
            model = workload.build(counts).to(dtype).eval()
            inputs = workload.inputs()
        inputs = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        mesh = ParallelMesh(config)
        handle = parallelize(model, mesh, attention_backend=options.attention_backend, compile=options.compile)
        seconds = forward_seconds(model, inputs, options.rounds)
        axes = (mesh.ulysses, mesh.ring, mesh.sequence)
        for axis in axes:
            axis.traffic.reset()
        model(**inputs)
        sent = sum(sum(axis.traffic.bytes.values()) for axis in axes)
        handle.remove()
        torch.compiler.reset()
        return Measured(seconds, sent)

    few = dict.fromkeys(workload.layers, options.layers)
    base = once(few)
    seconds, sent = base.seconds, float(base.bytes)
    for kind, count in workload.layers.items():
        more = once({**few, kind: 2 * options.layers})
        seconds += (more.seconds - base.seconds) / options.layers * (count - options.layers)
        sent += (more.bytes - base.bytes) / options.layers * (count - options.layers)
    return Measured(seconds, sent)


def whole(workload: Workload, options: argparse.Namespace) -> None:
    """Project whole pictures, print and save."""
    name, height, width, frames = workload.planned
    cost = model_cost(name, height=height, width=width, num_frames=frames)
    gpu, forward_s = options.gpu, None
    if gpu is None:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU to measure: name the kind that is meant, such as --gpu H100")
        here = machine_of_device(torch.cuda.get_device_name())
        if here is None:
            raise SystemExit(f"no figures of {torch.cuda.get_device_name()} are known: name another kind with --gpu")
        with torch.no_grad():
            gpu, forward_s = here.name, measure(workload, DiffusionParallelConfig(), options).seconds
    on, source = machine_for(cost, gpu, forward_s)
    found = project(cost, on, options.gpus)
    print(as_table(cost, on, source, found))
    results = {
        str(one.estimate.degrees): {**one.estimate.parts, "all": one.estimate.seconds, "published": one.published}
        for one in found
    }
    report(write(options.output, f"whole-{options.model}-{on.name}", vars(options), {"seconds": results}))


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, required=True)
    parser.add_argument("--ulysses", type=int, default=8)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--bandwidth", type=float, default=300.0, help="GB/s that a rank sends with (NVLink 4: ~300)")
    parser.add_argument("--layers", type=int, default=1, help="layers of each kind to time, and twice as many")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, for one rank and for many")
    parser.add_argument("--whole", action="store_true", help="project whole pictures instead of a step")
    parser.add_argument("--gpus", type=int, default=8, help="of --whole: the most of them")
    parser.add_argument("--gpu", help="of --whole: their kind; without it this GPU is measured")
    add_output_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    workload = WORKLOADS[options.model]
    if options.whole:
        whole(workload, options)
        return
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses, ring_degree=options.ring)
    with torch.no_grad():
        alone = measure(workload, DiffusionParallelConfig(), options)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
        # Nothing is exchanged, so nobody can be asked; lengths and heads here are divided evenly.
        with patch("omni_sp.collectives.gather_ints", pretend_all_ranks_alike):
            one = measure(workload, config, options)
        dist.destroy_process_group()
    exchange = one.bytes / (options.bandwidth * 1e9)
    projected = one.seconds + exchange
    published = workload.published.get(config.world_size)
    print(f"{options.model}, {config.equation}, {options.dtype}, exchange at {options.bandwidth:g} GB/s")
    print(f"one process                     {alone.seconds * 1e3:10.2f} ms a step (measured)")
    print(f"one rank's program              {one.seconds * 1e3:10.2f} ms (measured), sends {one.bytes / 1e6:.1f} MB")
    print(f"its exchange, nothing hidden    {exchange * 1e3:10.2f} ms (from bytes)")
    print(f"step on {config.world_size} ranks                 {projected * 1e3:10.2f} ms (projected)")
    print(f"speed-up                        {alone.seconds / projected:10.2f} (projected)", end="")
    print(f", {alone.seconds / one.seconds:.2f} with the exchange all hidden", end="")
    print(f"; published by others {published:.2f}" if published else "")
    timings = {
        "one process": Timing([alone.seconds]),
        "one rank's program": Timing([one.seconds], facts={"bytes": one.bytes, "exchange_s": exchange}),
    }
    name = f"rank-program-{options.model}-u{options.ulysses}-r{options.ring}"
    report(save(options.output, name, vars(options), timings))


if __name__ == "__main__":
    main()
