"""The planner's predictions beside what others have published, and beside this machine.

python -m benchmarks.planner              # every published run
python -m benchmarks.planner --here       # processor seconds of a rank of 1, 2 and 4 on this machine, for three models
                                          # (a minute or two on a quiet machine)

Of each stack (a publisher's software on one machine) the figure on one GPU is the base: it gives the efficiency. At
most two more numbers are fitted to the stack's other figures, as many as it has figures: microseconds that the host
needs for a block, and microseconds that an exchange adds. Of a stack with no more figures than fitted numbers the error
says little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from omni_sp import ParallelMesh, parallelize
from omni_sp.planner.cost import ModelCost, model_cost
from omni_sp.planner.estimate import Degrees, estimate
from omni_sp.planner.inputs import Size
from omni_sp.planner.machines import Machine, machine
from omni_sp.planner.published import PUBLISHED
from omni_sp.testing.ranks import RankPool

RUNS_FILE = Path(__file__).with_name("published_runs.json")
LIMIT = 0.15
HERE_RANKS = (1, 2, 4)
HERE: dict[str, tuple[Size, dict[str, Any]]] = {
    "Qwen-Image": (Size(512, 512), {"num_layers": 2, "num_attention_heads": 8}),
    "FLUX.1-dev": (Size(512, 512), {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 8}),
    "Wan2.2-T2V-A14B": (Size(256, 256, 17), {"num_layers": 2, "num_attention_heads": 8, "ffn_dim": 4096}),
}
"""Models that a CPU runs in a second: size, and what their configuration has less."""
_cost = cache(model_cost)
_FIELDS = {"ulysses": "ulysses_degree", "ring": "ring_degree", "cfg": "cfg_parallel_size"}


@dataclass(frozen=True)
class Fitted:
    """One stack, as predicted.

    Attributes:
        stack: its name.
        machine: with the fitted numbers.
        num_fitted: how many there are beyond the efficiency, which the base gives.
        rows: degrees, published seconds, predicted seconds.
    """

    stack: str
    machine: Machine
    num_fitted: int
    rows: tuple[tuple[str, float, float], ...]

    @property
    def errors(self) -> dict[str, float]:
        """Relative, by degrees."""
        return {degrees: predicted / published - 1 for degrees, published, predicted in self.rows}

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(map(abs, self.errors.values()))


def degrees_of(text: str) -> Degrees:
    """``"ring 2 x ulysses 2"`` as degrees."""
    pairs = (part.split() for part in text.split(" x "))
    values: dict[str, Any] = {_FIELDS[name]: int(value) for name, value in pairs}
    return Degrees(**values)


def at_base(cost: ModelCost, on: Machine, base_s: float) -> Machine:
    """The machine with the efficiency at which one device takes so long."""
    low, high = 0.001, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = estimate(cost, replace(on, efficiency=middle), Degrees()).seconds > base_s
        low, high = (middle, high) if slow else (low, middle)
    return replace(on, efficiency=high)


def fit(entry: Mapping[str, Any]) -> Fitted:
    """Fit a stack's two numbers: the pair with the smallest worst error, of a grid that is refined."""
    size = {key: entry[key] for key in ("height", "width", "num_frames") if key in entry}
    cost = replace(_cost(entry["model"], **size), steps=entry["steps"], branches=entry["branches"])
    if entry.get("steps_only"):
        cost = replace(cost, encoder_parameters=0.0, vae_flops=0.0)
    runs = {name: (degrees_of(name), seconds) for name, seconds in entry["runs"].items()}
    num_fitted = min(2, len(runs))

    def predicted(host_us: float, exchange_us: float) -> Fitted:
        stack = machine(entry["gpu"], host_us=host_us, exchange_us=exchange_us, head_groups=1)
        stack = at_base(cost, stack, entry["base_s"])
        rows = tuple((name, seconds, estimate(cost, stack, one).seconds) for name, (one, seconds) in runs.items())
        return Fitted(entry["stack"], stack, num_fitted, rows)

    hosts = [0.0] if num_fitted == 1 else [0.0, *(100 * 1.25**n for n in range(20))]
    exchanges = [0.0, *(10 * 1.4**n for n in range(26))]
    return min((predicted(h, x) for h in hosts for x in exchanges), key=lambda found: found.worst)


def published() -> Iterator[Fitted]:
    """Every stack of the data file."""
    for entry in json.loads(RUNS_FILE.read_text()):
        yield fit(entry)


@dataclass(frozen=True)
class Seconds:
    """The least processor seconds of a forward on one rank.

    Attributes:
        whole: of the model alone.
        part: of its part of a parallelized one, replayed.
        small_whole: of the model alone, on a picture of few tokens.
        small_part: of its part there, which is mostly what sharing costs.
    """

    whole: float
    part: float
    small_whole: float
    small_part: float


def here(names: Sequence[str], rounds: int) -> None:
    """Print the processor seconds of a rank, in parts of one process's, beside the prediction.

    Processor seconds, since ranks that share cores wait for each other. One process is timed on every rank at once, in
    turns with its part of the work: a core that shares caches with busy neighbours computes more slowly. Nothing is
    fitted: the whole model gives the efficiency, and a small picture what sharing costs the processor, which on a CPU
    hides behind nothing.
    """
    every = []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(RankPool(max(HERE_RANKS))) as pool:
        for name in names:
            size, changes = HERE[name]
            config = {**PUBLISHED[name].config, **changes}
            transformer = Path(folder, name, "transformer")
            transformer.mkdir(parents=True)
            named = {"_class_name": PUBLISHED[name].transformer, **config}
            (transformer / "config.json").write_text(json.dumps(named))
            for ranks in HERE_RANKS:
                found = pool.run(forward_seconds, name, size, config, rounds, ulysses=ranks, timeout=600)
                whole, part = statistics.mean(one.whole for one in found), max(one.part for one in found)
                predicted = predicted_here(str(transformer.parent), size, ranks, found) / whole
                measured = part / whole
                every.append((abs(predicted / measured - 1), f"{name}, ulysses {ranks}"))
                print(
                    f"{name:18}ulysses {ranks}: {measured:.3f} measured ({part:.2f} of {whole:.2f} s), "
                    f"{predicted:.3f} predicted, {predicted / measured - 1:+.1%}",
                    flush=True,
                )
    worst, where = max(every)
    print(f"worst of {len(every)}: {where}, {worst:.1%} (limit {LIMIT:.0%})")


def predicted_here(folder: str, size: Size, ranks: int, found: Sequence[Seconds]) -> float:
    """Predicted processor seconds of one rank's part of a forward."""

    def part_of(size: Size, whole_s: float) -> float:
        cost = _cost(folder, height=size.height, width=size.width, num_frames=size.frames)
        cost = replace(cost, steps=1, branches=1, encoder_parameters=0.0, vae_flops=0.0)
        on = at_base(cost, machine("CPU", host_us=0.0, exchange_us=0.0), whole_s)
        return estimate(cost, on, Degrees(ulysses_degree=ranks)).seconds

    small_whole = statistics.mean(one.small_whole for one in found)
    small_part = max(one.small_part for one in found)
    sharing = max(0.0, small_part - part_of(_small(size), small_whole))
    return part_of(size, statistics.mean(one.whole for one in found)) + sharing


def _small(size: Size) -> Size:
    return replace(size, height=64, width=64, frames=1)


def forward_seconds(mesh: ParallelMesh, name: str, size: Size, config: Mapping[str, Any], rounds: int) -> Seconds:
    """Time a model and its part on one rank."""
    import diffusers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        models = [getattr(diffusers, PUBLISHED[name].transformer)(**config).eval() for _ in range(2)]
        handle = parallelize(models[1], mesh)
        least = []
        for one in (size, _small(size)):
            real = tree_map_only(
                torch.Tensor, lambda x: torch.randn(x.shape) if x.is_meta else x, PUBLISHED[name].inputs(one)
            )
            if not getattr(models[0].config, "guidance_embeds", True):
                real.pop("guidance", None)
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds + 2):
                for model, taken in zip(models, seconds, strict=True):
                    if mesh.world_size > 1:
                        dist.barrier(group=mesh.world.group)
                    began = time.thread_time()
                    model(**real)
                    taken.append(time.thread_time() - began)
            least += [min(taken[2:]) for taken in seconds]
        handle.remove()
    return Seconds(*least)


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="measure CPU ranks of this machine instead")
    parser.add_argument("--models", nargs="*", choices=HERE, default=list(HERE), help="of --here")
    parser.add_argument("--rounds", type=int, default=3, help="forwards of which the quickest counts")
    options = parser.parse_args()
    if options.here:
        warnings.simplefilter("ignore")
        here(options.models, options.rounds)
        return
    every = []
    for found in published():
        on = found.machine
        print(
            f"{found.stack}: efficiency {on.efficiency:.2f}; {len(found.rows)} figures, {found.num_fitted} fitted "
            f"(host {on.host_us:.0f} us a block, {on.exchange_us:.0f} us an exchange)"
        )
        for degrees, seconds, predicted in found.rows:
            error = predicted / seconds - 1
            print(f"  {degrees:20}{seconds:10.2f} s published{predicted:10.2f} s predicted{error:+8.1%}")
            every.append((abs(error), f"{found.stack}, {degrees}"))
    worst, name = max(every)
    print(f"worst of {len(every)}: {name}, {worst:.1%} (limit {LIMIT:.0%})")


if __name__ == "__main__":
    main()
