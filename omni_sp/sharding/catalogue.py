"""Every transformer class of the installed diffusers, and what is known of it."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path

PROVEN_FILE = Path(__file__).with_name("proven.json")
"""The names of the classes that our tests prove exact over several ranks, written from those tests."""
SHARES_FILE = Path(__file__).with_name("shares.json")
"""What one rank of several does at published sizes, written by ``python -m benchmarks.flops``."""
ALLOWED_EXCESS = 0.03
"""A rank of P should do no more than 1/P of the operations and this part of all."""


@dataclass(frozen=True)
class ModelState:
    """What is known of one transformer class.

    Attributes:
        state: "exact" where our tests prove it over several ranks, else "unproven".
        note: what to do about an unproven class.
    """

    name: str
    state: str
    note: str


@dataclass(frozen=True)
class Share:
    """What the first of several ranks does of a forward.

    Attributes:
        degrees: of Ulysses and ring, such as "4x2".
        share: of the floating-point operations of one process.
        more: paths of the modules that do more than their part, and by how much of the whole forward.
        gathers: operations that needed a full tensor, and how often.
    """

    degrees: str
    share: float
    more: dict[str, float]
    gathers: dict[str, int]


def catalogue() -> list[ModelState]:
    """All classes under ``diffusers.models.transformers``, by name."""
    proven = frozenset(json.loads(PROVEN_FILE.read_text()))
    states = []
    for name in transformer_classes():
        state, note = (
            ("exact", "") if name in proven else ("unproven", "newer than our tests: try it with `omni-sp check`")
        )
        states.append(ModelState(name, state, note))
    return states


def transformer_classes() -> list[str]:
    """Names of the transformer classes of the installed diffusers."""
    import diffusers.models.transformers as package
    from diffusers.models.modeling_utils import ModelMixin

    names = set()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        names |= {
            name
            for name, member in vars(module).items()
            if inspect.isclass(member) and issubclass(member, ModelMixin) and member.__module__ == module.__name__
        }
    return sorted(names)


def as_markdown(states: list[ModelState]) -> str:
    """The page docs/models.md."""
    exact = sum(state.state == "exact" for state in states)
    lines = "\n".join(f"| `{state.name}` | {state.state} | {state.note or '-'} |" for state in states)
    return f"""# Models

Written by `omni-sp models --markdown`. {exact} of the {len(states)} transformer classes of diffusers are proven
exact over several ranks: on 2, 3 and 4 ranks (Ulysses, ring, both), with uneven picture and text lengths and masks,
fp32, within 1e-5 of one process (2e-3 where a model itself rounds to bfloat16 on the way). Any pipeline that uses them
runs unmodified.

Its token streams are split at its first block, and the sharded tensors are tracked through its own code; an operation
that needs the full tensor gathers it. What a block did is recorded once, and then replayed or compiled. A class that is
not in this list, yours or a future one, runs in the same way; `omni-sp check MODEL --ulysses-degree 2 --ring-degree 2`
shows how exact it is.

| class | state | |
|---|---|---|
{lines}

{shares_as_markdown()}"""


def shares_as_markdown() -> str:
    """The table of what one rank does, by model."""
    models = json.loads(SHARES_FILE.read_text())
    rows, exceptions = [], []
    for name, model in models.items():
        cells = []
        for number, values in model["ranks"].items():
            share = Share(**values)
            cells.append(f"{share.share:.1%}" + ("" if share.degrees.endswith("x1") else f" ({share.degrees})"))
            if share.share > 1 / int(number) + ALLOWED_EXCESS:
                cells[-1] = f"**{cells[-1]}**"
                named = ", ".join(f"`{path}` {part:.1%}" for path, part in share.more.items())
                exceptions.append(f"- {name} on {number} ranks, in parts of the whole forward: {named}\n")
        gathers = ", ".join(f"`{operation}` {count}x" for operation, count in share.gathers.items()) or "-"
        size = f"{model['size']} ({model['note']})" if model["note"] else model["size"]
        rows.append(f"| {name} | {size} | {' | '.join(cells)} | {gathers} |\n")
    return f"""## What one rank does

Of the floating-point operations of one process, at published sizes; counted by `python -m benchmarks.flops`. In
brackets Ulysses x ring, where the heads cannot be divided among all ranks. More than an even part is what every rank
does: embeddings, and the keys and values of a text that the picture attends to and that does not attend to it. Less is
what padding of the text saves, which is left out of attention. The last column has the operations that needed a full
tensor, of the forward on 8 ranks.

| model | size | 2 ranks | 4 ranks | 8 ranks | gathered |
|---|---|---|---|---|---|
{"".join(rows)}
Above 1/P + {ALLOWED_EXCESS:.0%}:

{"".join(exceptions)}"""
