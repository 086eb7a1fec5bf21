"""Which degrees are fastest on a machine, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from omni_sp.config import DiffusionParallelConfig
from omni_sp.errors import ConfigError
from omni_sp.planner.cost import ModelCost, model_cost
from omni_sp.planner.estimate import Degrees, Estimate, estimate
from omni_sp.planner.machines import Machine, machine
from omni_sp.validation import require_int

ALL = frozenset(field.name for field in fields(Degrees))
"""Every way to share work that the planner knows."""
CONFIGURABLE = ALL & {field.name for field in fields(DiffusionParallelConfig)}
"""Those that DiffusionParallelConfig takes."""
_MOST_GPUS = 65536  # looking at every way to share among more takes minutes


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    Attributes:
        cost: of the model.
        machine: that it was asked for.
        gpus: how many devices there are.
        alone: one device; None where the model does not fit it.
        choices: what fits, the best first.
        reasons: for each choice but the first, why it is worse; what does not fit comes last.
    """

    cost: ModelCost
    machine: Machine
    gpus: int
    alone: Estimate | None
    choices: tuple[Estimate, ...]
    reasons: tuple[tuple[Degrees, str], ...]

    @property
    def best(self) -> Degrees:
        """The degrees to take."""
        return self.choices[0].degrees

    @property
    def config_arguments(self) -> dict[str, Any]:
        """The best degrees as arguments of DiffusionParallelConfig, which has one result on its ranks."""
        chosen = asdict(self.best)
        return {name: chosen[name] for name in sorted(CONFIGURABLE - {"data_parallel_size"})}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "model": asdict(self.cost),
            "machine": asdict(self.machine),
            "gpus": self.gpus,
            "alone": asdict(self.alone) if self.alone else None,
            "choices": [asdict(choice) for choice in self.choices],
            "reasons": [{"degrees": asdict(degrees), "reason": reason} for degrees, reason in self.reasons],
        }


def plan(
    model: str | ModelCost,
    *,
    gpus: int,
    gpu: str | Machine = "H100",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    branches: int | None = None,
    throughput: bool = False,
    consider: Collection[str] | None = None,
) -> Plan:
    """Find the degrees that pay.

    Args:
        model: a name, as `model_cost` takes it, or what it returned.
        gpus: number of devices.
        gpu: a name, as `machine` takes it, or a machine.
        height: of the result in pixels; None for the published size.
        width: the same.
        num_frames: of a video; None for the published number.
        steps: of denoising; None for the pipeline's default.
        branches: forwards of one step; None for the pipeline's default.
        throughput: prefer most results an hour to the shortest time of one.
        consider: attributes of `Degrees` that may be used; None for those that DiffusionParallelConfig takes, and
            replicas, which are engines side by side. `ALL` has every one.

    Raises:
        ConfigError: a name is not known, a number is out of range, or the model fits these devices in no way.
    """
    hint = f"give a whole number from 1 to {_MOST_GPUS}"
    require_int("gpus", gpus, minimum=1, maximum=_MOST_GPUS, error=ConfigError, hint=hint)
    if isinstance(model, str):
        model = model_cost(model, height=height, width=width, num_frames=num_frames, steps=steps, branches=branches)
    on = machine(gpu) if isinstance(gpu, str) else gpu
    usable = CONFIGURABLE | {"data_parallel_size"} if consider is None else frozenset(consider)
    if unknown := usable - ALL:
        raise ConfigError(f"consider has {sorted(unknown)}: give some of {sorted(ALL)}")
    found = [fastest_that_fits(model, on, one, usable) for one in degrees(gpus, model.branches, usable)]
    fitting = [one for one in found if one.memory_gb <= on.memory_gb]
    if not fitting:
        least = min(one.memory_gb for one in found)
        raise ConfigError(
            f"{model.name} needs {least:.0f} GB a device at the least, and {on.name} has {on.memory_gb:g} GB: take "
            "larger devices, a smaller size, or consider sharded weights and offload"
        )

    def rank(one: Estimate) -> tuple[float, int, int]:
        seconds = one.seconds / one.degrees.data_parallel_size if throughput else one.seconds
        return round(seconds, 6), one.degrees.one_result, one.degrees.ring_degree

    fitting.sort(key=rank)
    alone = next((one for one in fitting if one.degrees.one_result == 1), None)
    reasons = [(one.degrees, why_worse(one, fitting[0], model, on, gpus)) for one in fitting[1:]]
    reasons += [
        (one.degrees, f"needs {one.memory_gb:.0f} GB of {on.memory_gb:g} GB")
        for one in found
        if one.memory_gb > on.memory_gb
    ]
    return Plan(model, on, gpus, alone, tuple(fitting), tuple(reasons))


def degrees(gpus: int, branches: int, usable: Collection[str] = ALL) -> Iterator[Degrees]:
    """Every cfg x ring x ulysses whose product divides the devices, with as many replicas as there is room for.

    Args:
        gpus: number of devices.
        branches: of guidance.
        usable: attributes of `Degrees`; the others keep their defaults.
    """
    for one_result in _divisors(gpus):
        for cfg in _divisors(math.gcd(branches, one_result)) if "cfg_parallel_size" in usable else (1,):
            sequence = one_result // cfg
            for ring in _divisors(sequence) if "ring_degree" in usable else (1,):
                yield Degrees(
                    ulysses_degree=sequence // ring,
                    ring_degree=ring,
                    cfg_parallel_size=cfg,
                    data_parallel_size=gpus // one_result if "data_parallel_size" in usable else 1,
                )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def fastest_that_fits(cost: ModelCost, on: Machine, one: Degrees, usable: Collection[str] = ALL) -> Estimate:
    """The fastest way that fits: whole or sharded weights or offload, the VAE on one rank or all; or else the smallest.

    Of equals, the one with the fewest of these is first.
    """

    def values(name: str, is_possible: bool) -> list[bool]:
        return [False, True] if is_possible and name in usable else [False]

    several = one.one_result > 1
    found = [
        estimate(cost, on, replace(one, vae_parallel=vae, shard_weights=shard, offload=offload))
        for offload in values("offload", True)
        for shard in values("shard_weights", one.sequence > 1 and not offload)
        for vae in values("vae_parallel", several)
    ]
    fitting = [each for each in found if each.memory_gb <= on.memory_gb]
    if fitting:
        return min(fitting, key=lambda each: round(each.seconds, 6))
    return min(found, key=lambda each: each.memory_gb)


def why_worse(one: Estimate, best: Estimate, cost: ModelCost, on: Machine, gpus: int) -> str:
    """One sentence on what costs most, compared with the best."""
    chosen = one.degrees
    more = {part: seconds - best.parts[part] for part, seconds in one.parts.items()}
    largest = max(more, key=lambda part: more[part])
    if more[largest] <= 0:
        return f"{one.seconds:.2f} s for one result, where the best takes {best.seconds:.2f} s on all replicas together"
    if largest in ("linear", "attention"):
        return _compute_reason(chosen, best.degrees, cost, gpus)
    if largest == "exchange":
        attention = one.parts["attention"]
        if one.exchange_s > attention:
            exchange = f"the exchange ({_text(one.exchange_s)}) takes longer than the attention ({_text(attention)})"
            return f"{on.link.gb_per_s:g} GB/s between devices: {exchange}"
        less = "" if chosen.cfg_parallel_size >= best.degrees.cfg_parallel_size else ", and guidance exchanges nothing"
        kind = f"ring {chosen.ring_degree}" if chosen.ring_degree > 1 else f"ulysses {chosen.ulysses_degree}"
        return f"{kind}: {_text(more[largest])} more of exchanges are not hidden{less}"
    return {
        "host": f"the host starts kernels more slowly than the device computes them: {_text(more[largest])} of waiting",
        "vae": f"fewer ranks decode: {_text(more[largest])} more",
        "encoder": f"the encoder takes {_text(more[largest])} more",
        "transfer": f"weights are not whole on the device: {_text(more[largest])} of waiting for them",
    }[largest]


def _text(seconds: float) -> str:
    """For people, who compare choices that differ by hundredths of a second."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.1g} s"


def _compute_reason(chosen: Degrees, best: Degrees, cost: ModelCost, gpus: int) -> str:
    if chosen.one_result < best.one_result:
        return f"only {chosen.one_result} of {gpus} devices share a result"
    ulysses = chosen.ulysses_degree
    if ulysses > cost.heads:
        return f"ulysses {ulysses} of {cost.heads} heads leaves {ulysses - cost.heads} ranks idle in attention"
    if cost.heads % ulysses:
        most = -(-cost.heads // ulysses)
        even = cost.heads / ulysses
        return f"ulysses {ulysses} of {cost.heads} heads: the busiest rank has {most}, an even part is {even:.1f}"
    return "the shards are less even"
