"""Every transformer class of the installed diffusers, and what is known of it."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from omni_sp.sharding.models import PLANNED

PROVEN_FILE = Path(__file__).with_name("proven.json")
"""The names of the classes that our tests prove exact over several ranks, written from those tests."""


@dataclass(frozen=True)
class ModelState:
    """What is known of one transformer class.

    Attributes:
        state: "exact" where our tests prove it over several ranks, else "unproven".
        how: "plan" where a plan says what is split and gathered, "followed" where its tensors are tracked.
        note: what to do about an unproven class.
    """

    name: str
    state: str
    how: str
    note: str


def catalogue() -> list[ModelState]:
    """All classes under ``diffusers.models.transformers``, by name."""
    proven = frozenset(json.loads(PROVEN_FILE.read_text()))
    states = []
    for name in transformer_classes():
        how = "plan" if name in PLANNED else "followed"
        state, note = (
            ("exact", "") if name in proven else ("unproven", "newer than our tests: try it with `omni-sp check`")
        )
        states.append(ModelState(name, state, how, note))
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
    lines = "\n".join(f"| `{state.name}` | {state.state} | {state.how} | {state.note or '-'} |" for state in states)
    return f"""# Models

Written by `omni-sp models --markdown`. {exact} of the {len(states)} transformer classes of diffusers are proven
exact over several ranks: on 2, 3 and 4 ranks (Ulysses, ring, both), with uneven picture and text lengths and masks,
fp32, within 1e-5 of one process (2e-3 where a model itself rounds to bfloat16 on the way). Any pipeline that uses them
runs unmodified.

*plan*: its token streams are split and gathered where a plan says; this is fastest, and its blocks may be compiled.
*followed*: its token streams are split at its first block, and the sharded tensors are tracked through its own code; an
operation that needs the full tensor gathers it. A class that is not in this list, yours or a future one, is followed
too; `omni-sp check MODEL --ulysses-degree 2 --ring-degree 2` shows how exact it is.

| class | state | how | |
|---|---|---|---|
{lines}
"""
