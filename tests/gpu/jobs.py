"""What ranks do for the tests on GPUs, on any device: functions for `omni_sp.doctor.ranks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from omni_sp import parallelize
from omni_sp.attention import SequenceLayout, sequence_parallel_attention
from omni_sp.doctor.ranks import Rank
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs

FORWARDS = 5


def overlapped(rank: Rank) -> bool:
    """Whether attention whose exchanges hide behind another group's gives the bits of one that waits, 20 times."""
    generator = torch.Generator().manual_seed(rank.mesh.rank)
    lengths = tuple(700 - 13 * other for other in range(rank.mesh.world_size))
    query = torch.randn(1, lengths[rank.mesh.rank], 12, 64, generator=generator).to(rank.device, torch.bfloat16)
    layout = SequenceLayout(lengths, lengths)

    def attend(head_groups: int) -> torch.Tensor:
        return sequence_parallel_attention(query, query, query, mesh=rank.mesh, layout=layout, head_groups=head_groups)

    plain = attend(1)
    return all(torch.equal(plain, attend(3)) for _ in range(20))


@dataclass(frozen=True)
class Forwards:
    """A transformer over ranks.

    Attributes:
        error: relative to one process.
        same_bits: every forward, followed, recorded, replayed or in a graph, gave the same.
        replayed: blocks.
        in_graphs: forwards.
        not_in_graphs: others, where graphs are wanted, by the reason why.
    """

    error: float
    same_bits: bool
    replayed: int
    in_graphs: int
    not_in_graphs: dict[str, int]


def forwards(rank: Rank, cuda_graphs: bool) -> Forwards:
    """A tiny transformer in float32: on this rank alone, followed over all, and replayed over all."""

    def on_device(inputs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda x: x.to(rank.device), inputs)

    torch.manual_seed(0)
    model, inputs = randomise(qwen_image(heads=4)).to(rank.device), on_device(qwen_inputs())
    with torch.no_grad():
        wanted = model(**inputs)[0]
        handle = parallelize(model, rank.mesh, replay=False)
        outs = [model(**inputs)[0].clone()]
        handle.remove()
        handle = parallelize(model, rank.mesh, cuda_graphs=cuda_graphs)
        outs += [model(**inputs)[0].clone() for _ in range(FORWARDS)]
        counts = handle.blocks
        handle.remove()
    same = all(torch.equal(outs[0], out) for out in outs[1:])
    error = relative_error(outs[0].cpu(), wanted.cpu())
    return Forwards(error, same, counts.replayed, counts.in_graphs, dict(counts.not_in_graphs))
