"""One attention: ours, one process, the floor, and every peer that runs here, in turns.

python -m benchmarks.attention --ranks 2 --tokens 4096 --heads 8 --head-dim 64 --dtype float32
python -m benchmarks.attention --ranks 2 4 --tokens 1024 4096 16384     # growth: one run for each, and a plot over all
python -m benchmarks.attention --masked 0.2 --batch 2 --peers          # a fifth of the keys masked, and none

The *floor* is a rank's share of the heads over all tokens without any exchange: what no Ulysses can beat. Peers are
diffusers' context parallelism (its configuration is set up by hand, because its own start-up divides by the number of
accelerators) and yunchang (its math kernel, the one that it has for a CPU).

With ``--masked`` ours also runs under a mask at the end of each row, as the padding of prompts is: with the mask known
to all ranks, whose masked keys are left out, and with each rank's own, which travels. The second row of a batch has
half as many masked keys, so that rows differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.anatomy import exchange_share, peak_memory
from benchmarks.interleaved import (
    Answer,
    Timing,
    add_output_options,
    paired,
    plot,
    plot_growth,
    report,
    save,
    summary,
    table,
    take_turns,
)
from omni_sp.attention import (
    SequenceLayout,
    WholeKeyMask,
    local_attention,
    select_strategy,
    sequence_parallel_attention,
    split_evenly,
)
from omni_sp.errors import OmniSPError
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error

BASE, FLOOR, OURS = "one process", "floor (no exchange)", "ours"
MASKED, MASK_SENT = "ours, masked keys left out", "ours, the mask travels"


@dataclass(frozen=True)
class Settings:
    """The shape."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    peers: tuple[str, ...]
    rounds: int
    masked: float


def whole_sequence(settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.tokens, settings.heads, settings.head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(getattr(torch, settings.dtype)) for _ in range(3))
    return query, key, value


def key_mask(settings: Settings) -> torch.Tensor:
    """The mask of the whole sequence: a share of the last keys of each row, and half of it in every second row."""
    kept = [settings.tokens - int(settings.tokens * settings.masked / (1 + row % 2)) for row in range(settings.batch)]
    return torch.arange(settings.tokens) < torch.tensor(kept)[:, None]


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


def run(mesh: ParallelMesh, settings: Settings) -> Answer:
    """On one rank: every contender's rounds, and what else is measured of them."""
    warnings.simplefilter("ignore")  # the peers' own
    whole = whole_sequence(settings)
    lengths = split_evenly(settings.tokens, mesh.world_size)
    layout = SequenceLayout(lengths, lengths)
    query, key, value = (x.split(list(lengths), dim=1)[mesh.rank].contiguous() for x in whole)
    fewer = [x[:, :, : -(-settings.heads // mesh.world_size)].contiguous() for x in whole]
    scheme = "ulysses" if mesh.ring.size == 1 else "ring"
    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        FLOOR: lambda: lambda: local_attention(fewer[0], fewer[1], fewer[2]),
        OURS: lambda: lambda: sequence_parallel_attention(query, key, value, mesh=mesh, layout=layout),
    }
    mask = key_mask(settings)
    if settings.masked:
        under_mask = partial(sequence_parallel_attention, query, key, value, mesh=mesh, layout=layout)
        whole_mask, own_mask = WholeKeyMask(mask, lengths), mask.split(list(lengths), dim=1)[mesh.rank]
        candidates[MASKED] = lambda: partial(under_mask, key_mask=whole_mask)
        candidates[MASK_SENT] = lambda: partial(under_mask, key_mask=own_mask)
    if "diffusers" in settings.peers:
        candidates["diffusers"] = lambda: diffusers_peer(mesh, (query, key, value), scheme)
    if "yunchang" in settings.peers and scheme == "ulysses":
        candidates["yunchang (math kernel)"] = lambda: yunchang_peer(mesh, (query, key, value), layout)
    contenders: dict[str, Callable[[], Any]] = {BASE: lambda: local_attention(*whole) if mesh.rank == 0 else None}
    answer = Answer()
    sample = slice(0, 64)
    wanted = attention(query[:, sample], whole[1], whole[2])
    wanted_under_mask = attention(query[:, sample], whole[1], whole[2], key_mask=mask)
    with torch.no_grad():
        for name, make in candidates.items():
            try:
                contenders[name] = make()
                out = contenders[name]()
            except (OmniSPError, ValueError, RuntimeError, AssertionError) as error:
                contenders.pop(name, None)
                answer.refused[name] = " ".join(str(error).split())[:120]
                continue
            if name != FLOOR:
                is_masked = name in (MASKED, MASK_SENT)
                answer.errors[name] = relative_error(out[:, sample], wanted_under_mask if is_masked else wanted)
        for axis in (mesh.ulysses, mesh.ring):
            axis.traffic.reset()
        contenders[OURS]()
        answer.facts["bytes_sent"] = sum(sum(axis.traffic.bytes.values()) for axis in (mesh.ulysses, mesh.ring))
        answer.memory = {name: peak_memory(call) for name, call in contenders.items()}
        answer.seconds = take_turns(contenders, settings.rounds)
        answer.exchange[OURS] = statistics.median(exchange_share(contenders[OURS]) for _ in range(5))
    return answer


def yunchang_peer(
    mesh: ParallelMesh, own: tuple[torch.Tensor, torch.Tensor, torch.Tensor], layout: SequenceLayout
) -> Callable[[], torch.Tensor]:
    """Yunchang's LongContextAttention, with the kernel that it has for a CPU."""
    attend = select_strategy("yunchang", mesh, "auto")
    return lambda: attend(*own, key_mask=None, is_causal=False, scale=None, layout=layout)


def compare(settings: Settings, ranks: int, scheme: str, command: dict[str, Any]) -> dict[str, Timing]:
    """One shape: run, print and save."""
    pool = RankPool(ranks)
    try:
        degrees = (ranks, 1) if scheme == "ulysses" else (1, ranks)
        answers = pool.run(run, settings, ulysses=degrees[0], ring=degrees[1], timeout=1800)
    finally:
        pool.close()
    timings = summary(answers)
    timings[OURS].facts["bytes_sent_per_rank"] = [answer.facts["bytes_sent"] for answer in answers]
    crowd = ", ranks share cores" if ranks > (os.cpu_count() or 1) else ""
    title = (
        f"{scheme} x {ranks}{crowd}: B{settings.batch} S{settings.tokens} H{settings.heads} D{settings.head_dim} "
        f"{settings.dtype}"
    )
    print(title)
    print(table(timings, BASE, OURS, ranks))
    print(f"ours / floor: {paired(timings, OURS, FLOOR):.3f}")
    if settings.masked:
        print(f"masked keys left out / without a mask: {paired(timings, MASKED, OURS):.3f}")
    growth = "-growth" if len(command["tokens"]) > 1 else ""
    masked = f"-masked-batch{settings.batch}" if settings.masked else ""
    name = f"attention-{scheme}{ranks}-{settings.tokens}-{settings.dtype}{growth}{masked}"
    path = save(command["output"], name, command, timings)
    report(path, plot(path, title, timings))
    return timings


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--scheme", choices=("ulysses", "ring"), default="ulysses")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peers", nargs="*", choices=("diffusers", "yunchang"), default=["diffusers", "yunchang"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--masked", type=float, default=0.0, help="the share of keys that is masked; 0 times no mask")
    add_output_options(parser)
    options = parser.parse_args()
    lines: dict[str, dict[int, float]] = {}
    for ranks in options.ranks:
        for tokens in options.tokens:
            shape = (options.batch, tokens, options.heads, options.head_dim)
            settings = Settings(*shape, options.dtype, tuple(options.peers), options.rounds, options.masked)
            timings = compare(settings, ranks, options.scheme, vars(options))
            for name in timings:
                if name != BASE and timings[name].seconds:
                    speedup = 1 / paired(timings, name, BASE)
                    lines.setdefault(f"{name} x {ranks}", {})[tokens] = speedup
    if len(options.tokens) > 1:
        report(plot_growth(options.output, f"attention-{options.scheme}-growth-{options.dtype}", lines, "tokens"))


if __name__ == "__main__":
    main()
