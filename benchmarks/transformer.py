"""A Qwen-Image transformer forward: ours, one process, and every peer that runs here, in turns.

python -m benchmarks.transformer --ranks 2 --height 64 --width 64 --text-tokens 128
python -m benchmarks.transformer --compile --peers --height 32 --width 32 --heads 24 --head-dim 128 --layers 2

With ``--compile`` ours is compiled, and one process also runs compiled, as diffusers does it.
Peers are diffusers' `enable_parallelism` and cache-dit's, each with one patch so that it starts without an accelerator:
`torch.accelerator.device_count` answers 1 while it sets itself up. Each peer has processes of its own, in which
ours and one process take turns with it: cache-dit replaces attention backends of diffusers, which then no longer runs
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.anatomy import exchange_share, peak_memory
from benchmarks.interleaved import Answer, Timing, add_output_options, plot, report, save, summary, table, take_turns
from omni_sp import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error

BASE, COMPILED, OURS = "one process", "one process, compiled", "ours"


@dataclass(frozen=True)
class Settings:
    """The shape."""

    height: int
    width: int
    text: int
    heads: int
    head_dim: int
    layers: int
    dtype: str
    rounds: int
    compile: bool = False


def build(settings: Settings) -> Any:
    """A Qwen-Image transformer with random weights, the same on all ranks."""
    from diffusers import QwenImageTransformer2DModel

    third = settings.head_dim // 4 // 2 * 2
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=settings.layers,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.heads,
        joint_attention_dim=128,
        axes_dims_rope=(settings.head_dim - 2 * third, third, third),
    )
    return randomise(model).to(getattr(torch, settings.dtype))


def make_inputs(settings: Settings) -> dict[str, Any]:
    """One picture and its text."""
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, settings.dtype)
    tokens = settings.height * settings.width
    return {
        "hidden_states": torch.randn(1, tokens, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, settings.text, 128, generator=generator).to(dtype),
        "encoder_hidden_states_mask": None,
        "timestep": torch.full((1,), 0.6, dtype=dtype),
        "img_shapes": [[(1, settings.height, settings.width)]],
        "return_dict": False,
    }


def diffusers_peer(mesh: ParallelMesh, model: Any) -> None:
    """Diffusers' context parallelism on the model."""
    from diffusers import ContextParallelConfig

    with patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.world_size))


def cache_dit_peer(mesh: ParallelMesh, model: Any) -> None:
    """cache-dit's context parallelism on the model."""
    from cache_dit import ParallelismConfig
    from cache_dit.distributed import enable_parallelism

    with patch("torch.accelerator.device_count", return_value=1):
        enable_parallelism(model, ParallelismConfig(ulysses_size=mesh.world_size))


PEERS: dict[str, Callable[[ParallelMesh, Any], None]] = {"diffusers": diffusers_peer, "cache-dit": cache_dit_peer}


def run(mesh: ParallelMesh, settings: Settings, peer: str | None) -> Answer:
    """On one rank: every contender's rounds, and what else was measured."""
    warnings.simplefilter("ignore")  # the peers' own
    inputs = make_inputs(settings)
    alone = build(settings)
    candidates: dict[str, Callable[[Any], object]] = {
        OURS: lambda model: parallelize(model, mesh, compile=settings.compile)
    }
    if peer is not None:
        candidates[peer] = lambda model: PEERS[peer](mesh, model)
    contenders: dict[str, Callable[[], Any]] = {BASE: lambda: alone(**inputs)[0] if mesh.rank == 0 else None}
    answer = Answer()
    with torch.no_grad():
        wanted = alone(**inputs)[0]
        for name, apply in candidates.items():
            model = build(settings)
            try:
                apply(model)
                # Ours records at its first forward, and compiles at its second.
                out = [model(**inputs)[0] for _ in range(3 if settings.compile else 1)][-1]
            except Exception as error:  # whatever a peer raises is its result here
                answer.refused[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
                continue
            answer.errors[name] = relative_error(out, wanted)
            contenders[name] = lambda model=model: model(**inputs)[0]  # type: ignore[misc]
        if settings.compile and mesh.rank == 0:
            compiled = build(settings)
            compiled.compile_repeated_blocks(fullgraph=True)
            answer.errors[COMPILED] = relative_error(compiled(**inputs)[0], wanted)
        if settings.compile:
            contenders[COMPILED] = lambda: compiled(**inputs)[0] if mesh.rank == 0 else None
        answer.memory = {name: peak_memory(call) for name, call in contenders.items()}
        answer.seconds = take_turns(contenders, settings.rounds)
        answer.exchange[OURS] = statistics.median(exchange_share(contenders[OURS]) for _ in range(3))
    return answer


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scheme", choices=("ulysses", "ring"), default="ulysses")
    parser.add_argument("--height", type=int, default=64, help="picture tokens down")
    parser.add_argument("--width", type=int, default=64, help="picture tokens across")
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compile ours, and one process too")
    add_output_options(parser)
    options = parser.parse_args()
    settings = Settings(
        options.height,
        options.width,
        options.text_tokens,
        options.heads,
        options.head_dim,
        options.layers,
        options.dtype,
        options.rounds,
        options.compile,
    )
    tokens = options.height * options.width
    shape = f"{options.layers} layers, {tokens}+{options.text_tokens} tokens"
    title = f"Qwen-Image, {shape}, {options.dtype}, {options.scheme} x {options.ranks}"
    print(title)
    # No peer has a ring that runs on a CPU.
    peers: list[str | None] = list(options.peers) if options.scheme == "ulysses" else []
    for peer in peers or [None]:
        timings = turns(settings, peer, options)
        print(table(timings, BASE, OURS, options.ranks))
        beside = (f"-{peer}" if peer is not None else "") + ("-compiled" if options.compile else "")
        name = f"transformer-{options.scheme}{options.ranks}-{tokens}+{options.text_tokens}-{options.dtype}{beside}"
        path = save(options.output, name, vars(options), timings)
        report(path, plot(path, title, timings))


def turns(settings: Settings, peer: str | None, options: argparse.Namespace) -> dict[str, Timing]:
    """One process, ours and one peer, in turns."""
    pool = RankPool(options.ranks)
    try:
        return summary(pool.run(run, settings, peer, **{options.scheme: options.ranks}, timeout=1800))
    finally:
        pool.close()


if __name__ == "__main__":
    main()
