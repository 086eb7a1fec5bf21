"""Every transformer class of the installed diffusers, and what is known of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass

from omni_sp.sharding.plans import planned_models
from omni_sp.sharding.plans.proven import PROVEN, REFUSED


@dataclass(frozen=True)
class ModelState:
    """One class.

    Attributes:
        name: of the class. state: "exact" (our tests prove it on several ranks), "refused", or "unproven".
        how: "plan" where a plan cuts and joins its streams, "followed" where pieces are followed through its code.
        note: why it is refused, or what to do.
    """

    name: str
    state: str
    how: str
    note: str


def catalogue() -> list[ModelState]:
    """All classes under ``diffusers.models.transformers``, by name."""
    return [_state(name) for name in transformer_classes()]


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


def _state(name: str) -> ModelState:
    if name in REFUSED:
        return ModelState(name, "refused", "", REFUSED[name])
    how = "plan" if name in planned_models() else "followed"
    if name in PROVEN:
        return ModelState(name, "exact", how, "")
    return ModelState(name, "unproven", how, "newer than our tests: try it with `omni-sp check`")


def as_markdown(states: list[ModelState]) -> str:
    """The page docs/models.md."""
    exact = sum(state.state == "exact" for state in states)
    rows = "\n".join(
        f"| `{state.name}` | {state.state} | {state.how or '-'} | {state.note or '-'} |" for state in states
    )
    return f"""# Models

Written by `omni-sp models --markdown`. {exact} of the {len(states)} transformer classes of diffusers are proven
exact over several ranks: on 2, 3 and 4 ranks (Ulysses, ring, both), with uneven picture and text lengths and masks,
fp32, within 1e-5 of one process (2e-3 where a model itself rounds to bfloat16 on the way). Any pipeline that uses them
runs unmodified.

*plan*: its streams are cut and joined where a plan says; fastest, and its blocks may be compiled. *followed*: it is cut
at its first block, and the pieces are followed through its own code; whatever needs whole tensors gets them. A class
that is not in this list, yours or a future one, is followed too; `omni-sp check MODEL --ulysses-degree 2
--ring-degree 2` tells how exact it is.

| class | state | how | |
|---|---|---|---|
{rows}
"""
