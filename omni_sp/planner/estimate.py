"""Seconds and memory of one rank, for given degrees on a given machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from omni_sp.attention.layout import head_shares, split_evenly
from omni_sp.planner.cost import ModelCost
from omni_sp.planner.machines import Machine

_BYTES = 2
"""Of a weight or an activation: bf16."""
_CONVOLUTIONS = 0.5
"""Convolutions reach this part of the efficiency of a transformer."""
_RESERVED_GB = 2.0
"""What the driver, the communication library and the allocator take."""


@dataclass(frozen=True)
class Degrees:
    """How ranks share the work. Attributes are named as in DiffusionParallelConfig."""

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_parallel_size: int = 1
    data_parallel_size: int = 1
    vae_parallel: bool = False
    shard_weights: bool = False
    offload: bool = False

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree

    @property
    def one_result(self) -> int:
        """Ranks that work on one result."""
        return self.sequence * self.cfg_parallel_size

    @property
    def world_size(self) -> int:
        """All ranks, of all replicas."""
        return self.one_result * self.data_parallel_size

    def __str__(self) -> str:
        parts = [
            f"{name} {value}"
            for name, value in (
                ("cfg", self.cfg_parallel_size),
                ("ring", self.ring_degree),
                ("ulysses", self.ulysses_degree),
                ("replicas", self.data_parallel_size),
            )
            if value > 1
        ]
        flags = [("VAE on all", self.vae_parallel), ("weights sharded", self.shard_weights), ("offload", self.offload)]
        return ", ".join((" x ".join(parts) or "one rank", *(text for text, is_on in flags if is_on)))


@dataclass(frozen=True)
class Estimate:
    """What is predicted for one result.

    Attributes:
        degrees: how ranks share it.
        seconds: from prompt to result.
        memory_gb: of the rank that needs most.
        parts: of the seconds: linear, attention, exchange (what is not hidden), host, encoder, vae, transfer.
        idle_heads: ranks of a Ulysses group that have no head.
        exchange_s: seconds of all exchanges, hidden or not.
    """

    degrees: Degrees
    seconds: float
    memory_gb: float
    parts: Mapping[str, float] = field(default_factory=dict)
    idle_heads: int = 0
    exchange_s: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """What the busiest rank sends for one attention.

    Attributes:
        ulysses_bytes: of queries, keys, values and the output, to the others of its group.
        ring_bytes: of keys and values, in each of the ring's steps.
        merge_bytes: that adding the partial result of one such step reads and writes, in fp32.
        share: the part of the attention that it computes.
        token_share: the part of the tokens that it holds.
        idle: ranks of a group without a head.
    """

    ulysses_bytes: float
    ring_bytes: float
    merge_bytes: float
    share: float
    token_share: float
    idle: int


@lru_cache(maxsize=4096)
def exchange(tokens: int, heads: int, head_dim: int, ulysses: int, ring: int) -> Exchange:
    """The layout's own shares, as bytes: of the first rank, whose shards are the longest."""
    lengths = split_evenly(tokens, ulysses * ring)
    own, group = lengths[0], sum(lengths[:ulysses])
    (shares,) = head_shares(heads, heads, ulysses)
    most = max(share.num_query for share in shares)
    row = head_dim * _BYTES
    sent = 3 * own * (heads - most) * row + (group - own) * most * row
    return Exchange(
        ulysses_bytes=float(sent if ulysses > 1 else 0),
        ring_bytes=float(2 * group * most * row if ring > 1 else 0),
        merge_bytes=12.0 * group * most * head_dim,
        share=group * most / (tokens * heads),
        token_share=own / tokens,
        idle=sum(share.num_query == 0 for share in shares),
    )


def estimate(cost: ModelCost, machine: Machine, degrees: Degrees) -> Estimate:
    """Predict one result.

    A block takes as long as its kernels and what of its exchanges nothing hides, or as long as the host needs to start
    them. Ulysses hides all but one group of heads behind the attention of the others; a ring hides each step behind the
    attention to the keys that are there.
    """
    ulysses, ring = degrees.ulysses_degree, degrees.ring_degree
    one = exchange(cost.tokens, cost.heads, cost.head_dim, ulysses, ring)
    rate = machine.tflops * 1e12 * machine.efficiency
    blocks = max(cost.blocks, 1)
    linear = (cost.whole_flops + (cost.linear_flops - cost.whole_flops) * one.token_share) / blocks / rate
    attention = cost.attention_flops * one.share / blocks / rate
    swap = step = merge = 0.0
    messages = 0
    bandwidth = machine.link.gb_per_s * 1e9 * machine.link_efficiency
    latency = (machine.link.latency_us + machine.exchange_us) * 1e-6
    if ulysses > 1:
        swap = one.ulysses_bytes / bandwidth
        messages += 2
    if ring > 1:
        step = one.ring_bytes / bandwidth
        merge = one.merge_bytes / (machine.memory_gb_per_s * 1e9)
        messages += ring - 1
    groups = max(1, min(machine.head_groups, cost.heads // ulysses))
    exposed = max(swap / groups, swap - attention * (groups - 1) / groups)
    exposed += (ring - 1) * (merge + max(0.0, step - attention / ring)) + messages * latency
    host = machine.host_us * 1e-6
    kernels = linear + attention + exposed
    waiting = max(0.0, host - kernels)
    forwards = cost.steps * math.ceil(cost.branches / degrees.cfg_parallel_size)
    calls = forwards * blocks
    parts = {
        "linear": calls * linear,
        "attention": calls * attention,
        "exchange": calls * exposed,
        "host": calls * waiting,
        "transfer": _transfer_seconds(cost, machine, degrees, forwards, calls * (kernels + waiting)),
        **_ends(cost, machine, degrees),
    }
    return Estimate(
        degrees,
        sum(parts.values()),
        memory_gb(cost, degrees, one.token_share),
        parts,
        one.idle,
        calls * (swap + (ring - 1) * step + messages * latency),
    )


def _ends(cost: ModelCost, machine: Machine, degrees: Degrees) -> dict[str, float]:
    """Seconds before and after denoising."""
    rate = machine.tflops * 1e12 * machine.efficiency
    read = cost.encoder_parameters * _BYTES / (machine.memory_gb_per_s * 1e9)
    encoder = max(read, 2 * cost.encoder_parameters * cost.text_tokens / rate) * min(cost.branches, 2)
    vae = cost.vae_flops / (rate * _CONVOLUTIONS)
    if degrees.vae_parallel and degrees.one_result > 1:
        vae = vae / degrees.one_result * 1.1  # the halo rows, and what is computed once more
    return {"encoder": encoder, "vae": vae}


def _transfer_seconds(cost: ModelCost, machine: Machine, degrees: Degrees, forwards: int, busy: float) -> float:
    """Seconds for weights that are not on the device, beyond what the forwards hide."""
    weights = cost.parameters * _BYTES
    if degrees.offload:
        return max(0.0, forwards * weights / (machine.host.gb_per_s * 1e9 * machine.link_efficiency) - busy)
    if degrees.shard_weights and degrees.sequence > 1:
        missing = weights * (degrees.sequence - 1) / degrees.sequence
        return max(0.0, forwards * missing / (machine.link.gb_per_s * 1e9 * machine.link_efficiency) - busy)
    return 0.0


def memory_gb(cost: ModelCost, degrees: Degrees, token_share: float) -> float:
    """10^9 bytes of the rank that needs most: weights, the results of one block's layers, and the largest stage."""
    transformer = cost.parameters * _BYTES
    if degrees.offload:
        weights = 2 * transformer / max(cost.blocks, 1)
    else:
        weights = transformer * cost.transformers
        if degrees.shard_weights and degrees.sequence > 1:  # over the ranks of a group, two blocks gathered at a time
            weights = weights / degrees.sequence + 2 * transformer / max(cost.blocks, 1)
        weights += (cost.encoder_parameters + cost.vae_parameters) * _BYTES
    block = cost.block_elements * _BYTES * token_share
    decode = cost.vae_elements * _BYTES / (degrees.one_result if degrees.vae_parallel else 1)
    encode = cost.encoder_parameters * _BYTES if degrees.offload else 0.0
    return (weights + max(block, decode, encode)) / 1e9 + _RESERVED_GB
