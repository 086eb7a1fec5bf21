"""Whole pictures and videos on several GPUs, projected by the planner: steps, text encoder and VAE, in seconds.

One number comes from outside the planner: the part of the device's operations that one forward reaches. It is that of
a forward measured on this device, or of a published run on one GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.planner import RUNS_FILE, at_base, degrees_of
from omni_sp.planner import Degrees, Estimate, Machine, ModelCost, estimate, machine


@dataclass(frozen=True)
class Whole:
    """One result on some ranks.

    Attributes:
        estimate: seconds and memory of a rank, projected.
        published: stack -> seconds that others have published for these degrees.
    """

    estimate: Estimate
    published: Mapping[str, float]


def layouts(gpus: int, branches: int) -> Iterator[Degrees]:
    """Ulysses on powers of two up to so many GPUs, without and with guidance shared, and the VAE on one rank or all."""
    ranks = 1
    while ranks <= gpus:
        for cfg in (1, 2) if branches > 1 and ranks > 1 else (1,):
            for is_shared in (False, True) if ranks > 1 else (False,):
                yield Degrees(cfg_parallel_size=cfg, ulysses_degree=ranks // cfg, vae_parallel=is_shared)
        ranks *= 2


def project(cost: ModelCost, on: Machine, gpus: int) -> list[Whole]:
    """Every layout on up to so many GPUs; weights are sharded where they would not fit otherwise."""
    found = []
    for one in layouts(gpus, cost.branches):
        seconds = estimate(cost, on, one)
        if seconds.memory_gb > on.memory_gb and one.sequence > 1:
            seconds = estimate(cost, on, replace(one, shard_weights=True))
        found.append(Whole(seconds, published_seconds(cost, on.name, one)))
    return found


def published_runs(cost: ModelCost, gpu: str) -> list[dict[str, Any]]:
    """The stacks that have published whole results of this model and size on this GPU."""
    return [
        entry
        for entry in json.loads(RUNS_FILE.read_text())
        if entry["model"] == cost.name
        and (entry["height"], entry["width"]) == (cost.size.height, cost.size.width)
        and entry.get("num_frames", 1) == cost.size.frames
        and (entry["gpu"], entry["steps"], entry["branches"]) == (gpu, cost.steps, cost.branches)
        and not entry.get("steps_only")
    ]


def published_seconds(cost: ModelCost, gpu: str, one: Degrees) -> dict[str, float]:
    """What others have published for these degrees, by stack. They decode on one rank, or do not say."""
    found = {}
    for entry in published_runs(cost, gpu):
        runs = {"one rank": entry["base_s"], **entry["runs"]}
        for name, seconds in runs.items():
            degrees = Degrees() if name == "one rank" else degrees_of(name)
            if degrees == replace(one, vae_parallel=False):
                found[str(entry["stack"])] = float(seconds)
    return found


def machine_for(cost: ModelCost, gpu: str, forward_s: float | None = None) -> tuple[Machine, str]:
    """A machine whose efficiency is known for this model, and where that is from.

    Args:
        cost: of the model.
        gpu: a name that the planner knows.
        forward_s: seconds of one forward that were measured on it; None to take those of a published run.
    """
    on = machine(gpu)
    if forward_s is not None:
        step = replace(cost, steps=1, branches=1, encoder_parameters=0.0, vae_flops=0.0)
        return at_base(step, on, forward_s), f"of a forward measured here, {forward_s:.3g} s"
    runs = published_runs(cost, on.name)
    if runs:
        return at_base(cost, on, runs[0]["base_s"]), f"of {runs[0]['base_s']:g} s on one GPU ({runs[0]['stack']})"
    return on, "assumed"


def as_table(cost: ModelCost, on: Machine, source: str, found: list[Whole]) -> str:
    """The layouts with the seconds of each part."""
    frames = f", {cost.size.frames} frames" if cost.size.frames > 1 else ""
    lines = [
        f"{cost.name}, {cost.size.width} x {cost.size.height}{frames}, {cost.steps} steps x {cost.branches} branches, "
        f"{on.name}: efficiency {on.efficiency:.2f}, {source}; the rest is projected",
        f"{'layout':44}{'steps s':>10}{'encoder s':>10}{'VAE s':>8}{'all s':>9}{'speed-up':>10}  published",
    ]
    alone = found[0].estimate.seconds
    for whole in found:
        parts = whole.estimate.parts
        ends = parts["encoder"] + parts["vae"]
        published = ", ".join(f"{seconds:g} s ({stack})" for stack, seconds in whole.published.items())
        lines.append(
            f"{whole.estimate.degrees!s:44}{whole.estimate.seconds - ends:10.2f}{parts['encoder']:10.2f}"
            f"{parts['vae']:8.2f}{whole.estimate.seconds:9.2f}{alone / whole.estimate.seconds:10.2f}  {published}"
        )
    return "\n".join(lines)
