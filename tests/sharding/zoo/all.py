"""All entries, by id. Each module beside this one has a list ENTRIES.

python -m tests.sharding.zoo.all --write          # the package's list of proven classes, and docs/models.md
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import tests.sharding.zoo
from omni_sp.sharding.catalogue import PROVEN_FILE, as_markdown, catalogue
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


def proven_classes() -> str:
    """The file of proven classes: one line for each class that has an entry, and is run over several ranks by it."""
    return json.dumps(sorted({entry.name for entry in ENTRIES.values()}), indent=2) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    PROVEN_FILE.write_text(proven_classes())
    (Path(__file__).resolve().parents[3] / "docs" / "models.md").write_text(as_markdown(catalogue()))
