"""All entries, by id. Each module beside this one has a list ENTRIES."""

from __future__ import annotations

import importlib
import pkgutil

import tests.pipelines.zoo
from tests.pipelines.zoo.entry import PipelineEntry

_OTHERS = ("all", "branches", "check", "entry", "parts")


def _all() -> dict[str, PipelineEntry]:
    entries: dict[str, PipelineEntry] = {}
    for module in pkgutil.iter_modules(tests.pipelines.zoo.__path__):
        if module.name not in _OTHERS:
            found = importlib.import_module(f"tests.pipelines.zoo.{module.name}").ENTRIES
            entries |= {entry.id: entry for entry in found}
    return entries


ENTRIES = _all()
