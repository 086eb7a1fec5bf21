"""The arrows between the rooms, read from the imports and held."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "omni_sp"

# A room may import rooms of lower levels only (and itself). `errors` and `config` lie at the bottom.
LEVELS = {
    "errors": 0,
    "command_line": 1,
