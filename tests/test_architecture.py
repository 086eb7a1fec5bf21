"""Which file may import which, read from the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "omni_sp"

# A package may import packages of lower levels only (and itself). `errors` and `validation` lie at the bottom.
LEVELS = {
    "errors": 0,
    "validation": 0,
    "version": 0,
    "tested_versions": 0,
    "machine": 0,
    "pipes": 0,
    "checksum": 0,
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
    "planner": 6,
    "engine": 7,
    "files": 8,
    "requests": 8,
    "events": 2,
    "omni": 9,
    "async_omni": 9,
    "server": 10,
    "doctor": 9,
    "cli": 11,
    "testing": 12,  # for tests and benchmarks: nothing else imports it
    "__main__": 12,
}
# Distributions that only these packages may import.
RESERVED = {
    "diffusers": {"sharding", "pipelines", "planner", "testing"},
    "transformers": {"pipelines", "llm", "testing"},
    "ray": {"engine"},
    "vllm": {"llm"},
}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

# What breaks a rule today, and shall not. A line that is no longer needed fails the test: delete it.
CYCLES: list[set[str]] = []
PRIVATE_IMPORTS: set[tuple[str, str]] = set()
IMPORTS_ACROSS_TREES: set[tuple[str, str]] = set()


@cache
def imports_of(path: Path) -> list[tuple[str, str]]:
    """Every import of a file, also inside functions and for type checkers: a module, and a name in it or ""."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def files_imported_by(path: Path) -> Iterator[Path]:
    """The files of this repository that hold what a file imports."""
    for module, name in imports_of(path):
        base = ROOT.joinpath(*module.split("."))
        for candidate in ((base / name).with_suffix(".py"), base / name / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                yield candidate
                break
        else:
            if (base / "__init__.py").is_file():
                yield base / "__init__.py"


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    """The first component below omni_sp that a file belongs to; a file for `python -m` is one by itself."""
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sources("omni_sp") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_import_lower_levels_only(path: Path) -> None:
    package = package_of(path)
    assert package in LEVELS, f"{package} is new: give it a level here and a line in docs/architecture.md"
    for module, name in imports_of(path):
        parts = f"{module}.{name}".split(".")
        if parts[0] == "omni_sp" and parts[1] in LEVELS and parts[1] != package:
            assert LEVELS[parts[1]] < LEVELS[package], f"{package} must not import {parts[1]}"
        if parts[0] in RESERVED:
            assert package in RESERVED[parts[0]], f"{package} must not import {parts[0]}"


def test_no_files_import_each_other() -> None:
    allowed = [{ROOT / name for name in cycle} for cycle in CYCLES]
    graph = {path: {*files_imported_by(path)} - {path} for path in sources("omni_sp")}
    for cycle in allowed:
        for path in cycle:
            assert graph[path] & cycle, f"{name_of(path)} is in no cycle any more: delete it from CYCLES"
            graph[path] -= cycle
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(name_of(path) for path in reversed(error.args[1])))


def test_private_names_stay_in_their_file() -> None:
    private = {
        (name_of(path), f"{module}.{name}")
        for path in sources("omni_sp", "tests", "benchmarks", "examples", "training", "compat/vllm_omni")
        for module, name in imports_of(path)
        if module.split(".")[0] in ("omni_sp", "tests", "benchmarks", "training", "vllm_omni")
        if any(part.startswith("_") and not part.startswith("__") for part in f"{module}.{name}".split("."))
    }
    assert private == PRIVATE_IMPORTS


def test_tests_benchmarks_and_examples_share_only_the_package() -> None:
    trees = {"tests", "benchmarks", "examples", "training"}
    forbidden = {"omni_sp": trees, "tests": {"benchmarks", "examples"}}
    forbidden |= {"benchmarks": {"tests"}, "examples": {"tests", "benchmarks"}}
    found = {
        (name_of(path), name_of(imported))
        for folder, others in forbidden.items()
        for path in sources(folder)
        for imported in files_imported_by(path)
        if imported.relative_to(ROOT).parts[0] in others
    }
    assert found == IMPORTS_ACROSS_TREES


def test_every_package_is_in_the_documentation() -> None:
    packages = {package_of(path) for path in FILES}
    assert packages == set(LEVELS)
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert all(package in text for package in packages)


def test_no_file_is_named_for_everything() -> None:
    assert not [path for path in FILES if path.name in FORBIDDEN_NAMES]


def test_files_stay_small() -> None:
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
