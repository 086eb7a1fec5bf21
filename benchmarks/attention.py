"""One attention: ours, one process, the floor, and every peer that runs here, in turns.

python -m benchmarks.attention --ranks 2 --tokens 4096 --heads 8 --head-dim 64 --dtype float32

The *floor* is a rank's share of the heads over all tokens without any exchange: what no Ulysses can beat. Peers are
diffusers' context parallelism (its configuration is set up by hand, because its own start-up divides by the number of
accelerators) and yunchang (its math kernel, the one that it has for a CPU).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.interleaved import plot, save, summary, table, take_turns
from omni_sp.attention import SequenceLayout, local_attention, select_strategy, sequence_parallel_attention, shares
from omni_sp.errors import OmniSPError
from omni_sp.mesh import ParallelMesh
from tests.attention.reference import attention, relative_error
from tests.ranks import RankPool

BASE = "one process"


@dataclass(frozen=True)
class Settings:
    """The shape."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    rounds: int


def whole_row(settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.tokens, settings.heads, settings.head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(getattr(torch, settings.dtype)) for _ in range(3))
    return query, key, value


def diffusers_peer(mesh: ParallelMesh, own: tuple[torch.Tensor, ...], scheme: str) -> Callable[[], torch.Tensor]:
    """Diffusers' own Ulysses or ring, on torch's scaled_dot_product_attention."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    degrees = {"ulysses_degree": mesh.world_size} if scheme == "ulysses" else {"ring_degree": mesh.world_size}
    context = ContextParallelConfig(**degrees)
    device_mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config = ParallelConfig(context_parallel_config=context)
    config.setup(mesh.rank, mesh.world_size, torch.device("cpu"), mesh=device_mesh)
    return lambda: dispatch_attention_fn(*own, backend=AttentionBackendName.NATIVE, parallel_config=config)


def run(mesh: ParallelMesh, settings: Settings) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, str]]:
    """On one rank: seconds of every contender, their outputs' errors and facts, and who refused."""
    warnings.simplefilter("ignore")  # the peers' own
    whole = whole_row(settings)
    lengths = shares(settings.tokens, mesh.world_size)
    layout = SequenceLayout(lengths, lengths)
    query, key, value = (x.split(list(lengths), dim=1)[mesh.rank].contiguous() for x in whole)
    fewer = [x[:, :, : -(-settings.heads // mesh.world_size)].contiguous() for x in whole]
    scheme = "ulysses" if mesh.ring.size == 1 else "ring"
    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        "floor (no exchange)": lambda: lambda: local_attention(fewer[0], fewer[1], fewer[2]),
        f"ours, {scheme}": lambda: lambda: sequence_parallel_attention(query, key, value, mesh=mesh, layout=layout),
        f"diffusers, {scheme}": lambda: diffusers_peer(mesh, (query, key, value), scheme),
    }
    if scheme == "ulysses":
        yunchang = select_strategy("yunchang", mesh, "auto")
        candidates["yunchang, ulysses (math)"] = lambda: (
            lambda: yunchang(query, key, value, key_mask=None, is_causal=False, scale=None, layout=layout)
        )
    contenders: dict[str, Callable[[], Any]] = {BASE: lambda: local_attention(*whole) if mesh.rank == 0 else None}
    refused: dict[str, str] = {}
    errors: dict[str, Any] = {}
    sample = slice(0, 64)
    wanted = attention(query[:, sample], whole[1], whole[2])
    with torch.no_grad():
        for name, make in candidates.items():
            try:
                contenders[name] = make()
                out = contenders[name]()
            except (OmniSPError, ValueError, RuntimeError, AssertionError) as error:
                contenders.pop(name, None)
                refused[name] = " ".join(str(error).split())[:120]
                continue
            if not name.startswith("floor"):
                errors[name] = relative_error(out[:, sample], wanted)
        for axis in (mesh.ulysses, mesh.ring):
            axis.traffic.reset()
        contenders[f"ours, {scheme}"]()
        errors["bytes"] = sum(sum(axis.traffic.bytes.values()) for axis in (mesh.ulysses, mesh.ring))
        return take_turns(contenders, settings.rounds), errors, refused


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scheme", choices=("ulysses", "ring"), default="ulysses")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    settings = Settings(options.batch, options.tokens, options.heads, options.head_dim, options.dtype, options.rounds)
    pool = RankPool()
    try:
        degrees = {"ulysses": options.ranks} if options.scheme == "ulysses" else {"ring": options.ranks}
        answers = pool.run(run, settings, **degrees, timeout=1800)
    finally:
        pool.close()
    timings = summary(answers)
    timings[f"ours, {options.scheme}"].facts["bytes_sent_per_rank"] = [answer[1]["bytes"] for answer in answers]
    title = f"B{options.batch} S{options.tokens} H{options.heads} D{options.head_dim} {options.dtype} x {options.ranks}"
    print(title)
    print(table(timings, BASE, options.ranks))
    floor, ours = timings["floor (no exchange)"].median, timings[f"ours, {options.scheme}"].median
    print(f"ours / floor: {ours / floor:.3f}")
    name = f"attention-{options.scheme}{options.ranks}-{options.tokens}-{options.dtype}"
    path = save(name, vars(options), timings)
    saved = [path, plot(path, title, timings)]
    print("saved", ", ".join(f"benchmarks/results/{file.name}" for file in saved if file is not None))


if __name__ == "__main__":
    main()
