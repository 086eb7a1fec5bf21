"""All entries, by id. Each module beside this one has a list ENTRIES."""

from __future__ import annotations

import importlib
import pkgutil

import tests.sharding.zoo
from tests.sharding.zoo.entry import Entry

_OTHERS = ("all", "check", "entry")


def _all() -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for module in pkgutil.iter_modules(tests.sharding.zoo.__path__):
        if module.name not in _OTHERS:
            found = importlib.import_module(f"tests.sharding.zoo.{module.name}").ENTRIES
            entries |= {entry.id: entry for entry in found}
    return entries


ENTRIES = _all()
