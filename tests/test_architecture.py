"""The arrows between the rooms, read from the imports and held."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "omni_sp"

# A room may import rooms of lower levels only (and itself). `errors` and `config` lie at the bottom.
LEVELS = {
    "errors": 0,
    "validation": 0,
    "command_line": 1,
    "config": 1,
    "outputs": 1,
    "shared_memory": 1,
    "mesh": 2,
    "collectives": 3,
    "attention": 4,
    "sharding": 5,
    "llm": 5,
    "pipelines": 6,
    "engine": 7,
    "files": 8,
    "requests": 8,
    "events": 2,
    "omni": 9,
    "async_omni": 9,
    "server": 10,
    "cli": 11,
    "testing": 12,
    "__main__": 12,
}
# Packages that only these rooms may import.
RESERVED = {
    "diffusers": {"sharding", "pipelines", "testing"},
    "transformers": {"pipelines", "llm", "testing"},
    "ray": set(),
    "vllm": {"llm"},
}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def room_of(path: Path) -> str:
    """The room that a file belongs to: the first component below the package; `python -m` is one by itself."""
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_downward(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"{room} is a new room: give it a level here and a line in docs/architecture.md"
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "omni_sp" and len(parts) > 1 and parts[1] in LEVELS and parts[1] != room:
            assert LEVELS[parts[1]] < LEVELS[room], f"{room} must not import {parts[1]}"
        if parts[0] in RESERVED:
            assert room in RESERVED[parts[0]], f"{room} must not import {parts[0]}"


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(LEVELS)
    told = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    assert all(room in told for room in rooms)


def test_no_file_is_named_for_everything() -> None:
    assert not [path for path in FILES if path.name in FORBIDDEN_NAMES]


def test_files_stay_small() -> None:
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
