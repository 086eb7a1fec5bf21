"""What a block costs the host: in one process, and on one rank of two that follows it or replays it.

python -m benchmarks.host                          # every class
python -m benchmarks.host --classes Flux --repeats 5 --no-save

All ways take turns in one process, on a fake process group: nothing is exchanged and nobody waits. Widths are tiny, so
what remains is the work of the host. Times are those of this thread alone, the least of all turns. A figure is the
difference of a model with more blocks and one with fewer, divided by the number of blocks between them: what a model
does before and after its blocks is not in it.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.interleaved import Timing, add_output_options, pyplot, report, save
from benchmarks.llm_rank_program import absent_ranks
from benchmarks.rank_program import pretend_all_ranks_alike
from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.attention import sequence_parallel_attention
from omni_sp.testing.components import transformer
from omni_sp.testing.reference import randomise

Inputs = dict[str, Any]
PLAIN, FOLLOWED, REPLAYED, CORE = "plain", "followed", "replayed", "core"
FEW, MANY = 2, 8
"""Blocks of each kind, of the two models."""
ALLOWANCE = 1.2
"""A replayed block may take so many times as long as a plain one, and the calls of the core on top."""


@dataclass(frozen=True)
class Case:
    """One class in miniature, with 32 tokens of a picture or video, and a text of 16.

    Attributes:
        inputs: makes the arguments of a forward.
        depth: the entries of its configuration that say how many blocks it has.
        changes: other values of its configuration.
    """

    inputs: Callable[[], Inputs]
    depth: tuple[str, ...] = ("num_layers",)
    changes: Mapping[str, Any] = field(default_factory=dict)


def _text(channels: int) -> Inputs:
    return {"encoder_hidden_states": torch.randn(1, 16, channels), "timestep": torch.full((1,), 0.6)}


def _tokens(channels: int) -> Inputs:
    return {"hidden_states": torch.randn(1, 32, channels)}


def _picture(patch: int = 2) -> Inputs:
    return {"hidden_states": torch.randn(1, 4, 4 * patch, 8 * patch)}


def _video() -> Inputs:
    return {"hidden_states": torch.randn(1, 4, 2, 8, 8)}


def _mask() -> Inputs:
    return {"encoder_attention_mask": torch.ones(1, 16, dtype=torch.bool)}


CASES: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        lambda: {
            **_tokens(16),
            **_text(24),
            "pooled_projections": torch.randn(1, 20),
            "guidance": torch.full((1,), 3.5),
            "img_ids": torch.zeros(32, 3),
            "txt_ids": torch.zeros(16, 3),
        },
        ("num_layers", "num_single_layers"),
    ),
    "Flux2Transformer2DModel": Case(
        lambda: {
            **_tokens(16),
            **_text(24),
            "guidance": torch.full((1,), 4.0),
            "img_ids": torch.zeros(1, 32, 4),
            "txt_ids": torch.zeros(1, 16, 4),
        },
        ("num_layers", "num_single_layers"),
    ),
    "QwenImageTransformer2DModel": Case(lambda: {**_tokens(16), **_text(20), "img_shapes": [[(1, 4, 8)]]}),
    "SD3Transformer2DModel": Case(lambda: {**_picture(), **_text(20), "pooled_projections": torch.randn(1, 12)}),
    "ZImageTransformer2DModel": Case(
        lambda: {"x": [torch.randn(4, 1, 8, 16)], "t": torch.full((1,), 0.6), "cap_feats": [torch.randn(32, 20)]},
        ("n_layers",),
    ),
    "AuraFlowTransformer2DModel": Case(
        lambda: {**_picture(), **_text(20)}, ("num_mmdit_layers", "num_single_dit_layers")
    ),
    "Lumina2Transformer2DModel": Case(
        lambda: {**_picture(), **_text(20), **_mask()},
    ),
    "SanaTransformer2DModel": Case(lambda: {**_picture(1), **_text(20), **_mask()}),
    "WanTransformer3DModel": Case(lambda: {**_video(), **_text(20)}),
    "HunyuanVideoTransformer3DModel": Case(
        lambda: {
            **_video(),
            **_text(20),
            **_mask(),
            "pooled_projections": torch.randn(1, 12),
            "guidance": torch.full((1,), 6000.0),
        },
        ("num_layers", "num_single_layers"),
    ),
    "LTXVideoTransformer3DModel": Case(
        lambda: {
            **_tokens(8),
            **_text(20),
            **_mask(),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        }
    ),
    "CogVideoXTransformer3DModel": Case(
        lambda: {**_text(20), "hidden_states": torch.randn(1, 2, 4, 8, 8)}, changes={"max_text_seq_length": 16}
    ),
    "MochiTransformer3DModel": Case(lambda: {**_video(), **_text(16), **_mask()}),
    "Kandinsky5Transformer3DModel": Case(
        lambda: {
            **_text(20),
            "hidden_states": torch.randn(1, 2, 8, 8, 9),
            "pooled_projections": torch.randn(1, 12),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(16),
            "scale_factor": (1.0, 2.0, 2.0),
        },
        ("num_visual_blocks",),
    ),
}


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a block, by way.

    Attributes:
        ways: "plain", "followed" and "replayed".
        core: of the calls of the core that a block makes, alone.
        core_calls: how many it makes.
        blocks: how the replaying model made the calls of its blocks.
    """

    ways: dict[str, float]
    core: float
    core_calls: float
    blocks: dict[str, Any]

    @property
    def gain(self) -> float:
        """How many times as long following takes as replaying."""
        return self.ways[FOLLOWED] / self.ways[REPLAYED]

    @property
    def of_bound(self) -> float:
        """What replaying takes, of what it may take."""
        return self.ways[REPLAYED] / (ALLOWANCE * self.ways[PLAIN] + self.core)


@contextmanager
def one_rank_of_two() -> Iterator[ParallelMesh]:
    """A mesh of two ranks of which this process is the first; the other is absent."""
    with (
        absent_ranks(2),
        patch("omni_sp.collectives.gather_ints", pretend_all_ranks_alike),
    ):
        yield ParallelMesh(DiffusionParallelConfig(ulysses_degree=2))


def measure(name: str, mesh: ParallelMesh, repeats: int) -> Measured:
    """Time the ways of one class in turns.

    Args:
        name: the class, one of ``CASES``.
        mesh: of `one_rank_of_two`.
        repeats: how many turns each way gets.
    """
    case = CASES[name]
    inputs = case.inputs()
    calls: dict[Any, Callable[[], Any]] = {}
    made: dict[int, Counter[Any]] = {}
    for number in (FEW, MANY):

        def build(number: int = number) -> Any:
            return randomise(transformer(name, **case.changes, **dict.fromkeys(case.depth, number)))

        models = {PLAIN: build(), FOLLOWED: build(), REPLAYED: build()}
        parallelize(models[FOLLOWED], mesh, replay=False)
        replayed = parallelize(models[REPLAYED], mesh)
        calls |= {(way, number): partial(model, **inputs) for way, model in models.items()}
        made[number], core = core_calls(build(), inputs, mesh)
    least = _least_ms({**calls, **core}, repeats)
    num_blocks = (MANY - FEW) * len(case.depth)
    between = made[MANY] - made[FEW]
    return Measured(
        {way: (least[way, MANY] - least[way, FEW]) / num_blocks for way, number in calls if number == MANY},
        sum(least[kind] * count for kind, count in between.items()) / num_blocks,
        between.total() / num_blocks,
        replayed.blocks.as_dict(),
    )


def core_calls(
    model: Any, inputs: dict[str, Any], mesh: ParallelMesh
) -> tuple[Counter[Any], dict[Any, Callable[[], Any]]]:
    """How often a forward calls the core, by the shapes that it passes, and a call of each kind to be repeated."""
    made: Counter[Any] = Counter()
    kinds: dict[Any, Callable[[], Any]] = {}

    def attention(*args: Any, **kwargs: Any) -> Any:
        kind = (*(tuple(x.shape) for x in args), str(kwargs["layout"]), kwargs["key_mask"] is None)
        made[kind] += 1
        kinds[kind] = partial(sequence_parallel_attention, *args, **kwargs)
        return kinds[kind]()

    with patch("omni_sp.attention.strategy.sequence_parallel_attention", attention):
        parallelize(model, mesh, replay=False)
    model(**inputs)
    return made, kinds


def _least_ms(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """The least milliseconds of this thread that each call took. They take turns; the first three do not count."""
    least = dict.fromkeys(calls, math.inf)
    for turn in range(-3, repeats):
        for key, call in calls.items():
            began = time.thread_time()
            call()
            took = time.thread_time() - began
            if turn >= 0:
                least[key] = min(least[key], took * 1e3)
    return least


def table(found: dict[str, Measured]) -> str:
    """Milliseconds a block, as text."""
    ways = [way for way in (PLAIN, FOLLOWED, REPLAYED) if any(way in one.ways for one in found.values())]
    head = "".join(f"{way:>10}" for way in [*ways, CORE])
    lines = [f"{'ms a block':34}{head}{'calls':>7}{'followed / replayed':>21}{'replayed / bound':>18}"]
    for name, one in found.items():
        figures = "".join(f"{one.ways[way]:>10.2f}" if way in one.ways else f"{'-':>10}" for way in ways)
        lines.append(f"{name:34}{figures}{one.core:>10.2f}{one.core_calls:>7.1f}{one.gain:>21.2f}{one.of_bound:>18.2f}")
    return "\n".join(lines)


def timings(found: dict[str, Measured]) -> dict[str, Timing]:
    """The same, to be saved."""
    return {
        f"{name}, {way}": Timing([ms / 1e3], facts=facts)
        for name, one in found.items()
        for way, ms, facts in [
            *((way, ms, one.blocks if way == REPLAYED else {}) for way, ms in one.ways.items()),
            (CORE, one.core, {"calls": one.core_calls}),
        ]
    }


def plot(output: Path | None, name: str, found: dict[str, Measured]) -> Path | None:
    """A group of bars for each class; None without matplotlib."""
    drawing = pyplot(output)
    if output is None or drawing is None:
        return None
    figure, axes = drawing.subplots(figsize=(8, 0.62 * len(found) + 1), layout="constrained")
    colours = {PLAIN: "tab:gray", FOLLOWED: "tab:blue", REPLAYED: "tab:orange"}
    for number, (way, colour) in enumerate(colours.items()):
        places = [(place + 0.2 * number, one.ways[way]) for place, one in enumerate(found.values()) if way in one.ways]
        if places:
            axes.barh(*zip(*places, strict=True), height=0.2, color=colour, label=way)
    axes.set_yticks([place + 0.3 for place in range(len(found))], list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms of the host a block, the least of all turns")
    axes.legend(fontsize=8)
    target = output / f"{name}.png"
    figure.savefig(target, dpi=120)
    drawing.close(figure)
    return target


def chosen(words: Sequence[str]) -> list[str]:
    """The classes whose names contain one of the words; all for no words."""
    return [name for name in CASES if not words or any(word in name for word in words)]


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="*", default=[], metavar="WORD", help="only classes with such a name")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each way")
    add_output_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    with torch.no_grad(), one_rank_of_two() as mesh:
        for name in chosen(options.classes):
            found[name] = measure(name, mesh, options.repeats)
            print(table({name: found[name]}), flush=True)
    print(table(found))
    report(save(options.output, "host", vars(options), timings(found)), plot(options.output, "host", found))


if __name__ == "__main__":
    main()
