"""The documentation: every public name stands on an API page, with every parameter, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "omni_sp": "omni_sp.md",
    "omni_sp.attention": "attention.md",
    "omni_sp.sharding": "sharding.md",
    "omni_sp.llm": "llm.md",
}
README_WORDS = 700
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def source_of(module: str) -> tuple[Path, ast.Module]:
    """A module's file and its syntax tree. Nothing is imported: packages that are not installed do not matter."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path, ast.parse(path.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """The entries of ``__all__``."""
    for node in source_of(module)[1].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def definition_of(module: str, name: str) -> tuple[Path, Definition] | None:
    """The class or function of that name and its file; None for a constant. Imports are followed."""
    path, tree = source_of(module)
    for node in ast.walk(tree):
        if isinstance(node, Definition) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("omni_sp"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition_of(node.module, alias.name)
    return None


def entries(node: Definition, section: str) -> set[str]:
    """The names that a section of a docstring describes, each on a line of its own."""
    lines = (ast.get_docstring(node) or "").splitlines()
    if f"{section}:" not in lines:
        return set()
    body = lines[lines.index(f"{section}:") + 1 :]
    end = next((index for index, line in enumerate(body) if line and not line.startswith(" ")), len(body))
    found = (re.match(r"    \*{0,2}(\w+)(?: \([^)]*\))?:", line) for line in body[:end])
    return {match[1] for match in found if match}


def second_errors(node: Definition) -> list[str]:
    """The exceptions that stand inside another's entry."""
    _, _, raises = (ast.get_docstring(node) or "").partition("Raises:\n")
    return re.findall(r"[.;] (\w+(?:Error|Exit)):", raises)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names that a caller may pass. ``**unknown: Never`` takes nothing."""
    arguments = node.args
    names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    for extra in (arguments.vararg, arguments.kwarg):
        if extra is not None and extra.annotation is not None and ast.unparse(extra.annotation) != "Never":
            names.add(extra.arg)
    return names - {"self", "cls"}


def fields(node: ast.ClassDef) -> set[str]:
    """The fields of a dataclass."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return set()
    targets = (field.target for field in node.body if isinstance(field, ast.AnnAssign))
    return {target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")}


def methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]


def missing_entries(module: str, name: str) -> list[str]:
    """What the docstrings of a public name lack, with file and line."""
    found = definition_of(module, name)
    if found is None:
        return []
    path, node = found
    wanted: list[tuple[Definition, set[str], set[str]]] = []
    if isinstance(node, ast.ClassDef):
        described = entries(node, "Args") | entries(node, "Attributes")
        wanted.append((node, fields(node), described))
        for method in methods(node):
            if method.name == "__init__" and ast.get_docstring(node):
                wanted.append((node, parameters(method), described))
            elif not method.name.startswith("_") and entries(method, "Args"):
                wanted.append((method, parameters(method), entries(method, "Args")))
    else:
        wanted.append((node, parameters(node), entries(node, "Args")))
    where = path.relative_to(ROOT)
    missing = [(item, sorted(names - described)) for item, names, described in wanted]
    missing += [
        (item, second_errors(item)) for item in [node, *(methods(node) if isinstance(node, ast.ClassDef) else [])]
    ]
    return [
        f"{where}:{item.lineno} {item.name}: no entry of its own for {', '.join(names)}"
        for item, names in missing
        if names
    ]


@pytest.mark.parametrize("module", PAGES)
def test_every_public_name_is_on_its_page(module: str) -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api" / PAGES[module]).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted({f"{module}.{name}" for name in public_names(module)} - set(shown)) == []


@pytest.mark.parametrize("module", PAGES)
def test_every_parameter_has_an_entry_of_its_own(module: str) -> None:
    missing = [line for name in public_names(module) for line in missing_entries(module, name)]
    assert not missing, "\n".join(missing)


def test_an_entry_inside_anothers_line_is_found() -> None:
    """The check above can fail."""
    text = 'def f(a, b, c):\n    """Add.\n\n    Args:\n        a: one. b: two.\n        c: three.\n    """'
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    assert parameters(function) - entries(function, "Args") == {"b"}
    (function,) = ast.parse('def f():\n    """Add.\n\n    Raises:\n        AError: one. BError: two.\n    """').body
    assert isinstance(function, ast.FunctionDef)
    assert second_errors(function) == ["BError"]


def test_every_file_that_the_prose_names_exists() -> None:
    """Links are checked by the site's build; names in commands and tables are not."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "compat/README.md"]
    named = re.compile(r"\b((?:omni_sp|tests|examples|benchmarks|training)/[\w/.+-]*\w)")
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in pages
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    ]
    assert not missing, "\n".join(missing)


def test_hints_install_what_is_here() -> None:
    """The package is installed from a clone: ``.[EXTRA]``, not a name of PyPI."""
    places = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
    places += [*(ROOT / "omni_sp").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    assert not [str(path) for path in places if "omni-sp[" in path.read_text(encoding="utf-8")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="the site is built where `pip install '.[docs]'` was done",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for module, page in PAGES.items():
        html = (tmp_path / "site/api" / page).with_suffix(".html").read_text(encoding="utf-8")
        shown = set(re.findall(r'id="([\w.]+)"', html))
        assert {f"{module}.{name}" for name in public_names(module)} <= shown | {"omni_sp.__version__"}
