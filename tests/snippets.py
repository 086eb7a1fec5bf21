"""The code blocks of README.md and docs/, the commands in them, and what a command's own parser makes of it."""

from __future__ import annotations

import argparse
import ast
import builtins
import re
import runpy
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from omni_sp.cli import main
from omni_sp.llm.speculation.checkpoint import SpeculatorConfig
from omni_sp.llm.vllm.cli_flags import for_vllm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- (not run|run in part): ([^>]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        where: page and line.
        language: "" and "sh" for commands, "python", or "text".
        code: what it holds.
        mark: "not run" where only its imports run here, "run in part" where only statements that need no unknown names
            do; None where all of it runs.
        why: the reason for the mark.
    """

    where: str
    language: str
    code: str
    mark: str | None = None
    why: str | None = None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command. In a session, commands begin with ``$``, and the rest is output."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @property
    def missing(self) -> set[str]:
        """The names that it uses and does not make."""
        known: set[str] = set()
        return {name for node in self.statements for name in unknown_names(node, known)}

    @property
    def statements(self) -> list[ast.stmt]:
        """Its Python, parsed; ``await`` is allowed everywhere."""
        tree = compile(self.code, self.where, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        assert isinstance(tree, ast.Module)
        return tree.body


def unknown_names(statement: ast.stmt, known: set[str]) -> set[str]:
    """The names that a statement needs beside ``known``, to which those that it makes are added."""
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(statement):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    known |= made
    return {node.id for node in names} - known - set(dir(builtins))


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT)
    return [
        Block(f"{name}:{text.count(chr(10), 0, match.start(3)) + 1}", match[3], match[4], match[1], match[2])
        for match in _BLOCK.finditer(text)
    ]


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


class _Parsed(BaseException):
    """Carries what a parser found out of the program that is not to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def parsed(words: list[str]) -> argparse.Namespace | None:
    """What a command's own parser makes of it, or None where it has none. The command is not run.

    Raises:
        AssertionError: there is no such program, file, target or option.
    """
    program, *rest = words
    match program:
        case "source":
            assert rest in ([".venv/bin/activate"], [".venv-vllm/bin/activate"]), f"no environment for {words}"
            return None
        case "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(rest) <= set(targets), f"no target for {words}"
            return None
        case "pip":
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            extras = {name for word in rest for name in re.findall(r"\.\[(\w+)\]", word)}
            assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extras), f"no extra for {words}"
            return None
        case "vllm":
            _require_known_flags(rest)
            return None
        case "srun":
            return parsed(rest[rest.index("torchrun") :])
        case "ray":
            return None if "--" not in rest else parsed(rest[rest.index("--") + 1 :])
        case "sbatch" | "kubectl":
            assert all((ROOT / word).is_file() for word in rest if "/" in word and "service/" not in word), (
                f"no {words}"
            )
            return None
        case "torchrun":
            place = next(place for place, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
            return parsed(["python", *rest[place:]])
        case "omni-sp":
            return None if rest[0] == "serve-llm" else _parsed_by(lambda: main(rest))
        case "python" if rest[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
            _require_known_flags(rest[2:])
            return None
        case "python" if rest[0] == "-m":
            return _parsed_by(lambda: runpy.run_module(rest[1], run_name="__main__"), rest[1:])
        case "python":
            path = ROOT / rest[0]
            assert path.is_file(), f"no program {rest[0]}"
            return _parsed_by(lambda: runpy.run_path(str(path), run_name="__main__"), rest)
    raise AssertionError(f"{program}: tell this test how its options are checked")


def _require_known_flags(words: list[str]) -> None:
    """Our flags for vLLM, where a speculator that they name is one of three tokens."""
    found = SpeculatorConfig(kind="lstm", n_predict=3, vocab_size=1, input_width=1, width=1)
    with mock.patch("omni_sp.llm.speculation.settings.read_config", return_value=found):
        for_vllm(words)


def _parsed_by(run: Any, argv: list[str] | None = None) -> argparse.Namespace:
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any) -> Any:
        raise _Parsed(parse_args(parser, *args))

    def stop_ours(_command: Any, options: argparse.Namespace) -> Any:
        raise _Parsed(options)

    with (
        warnings.catch_warnings(),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys.modules["omni_sp.cli.main"], "_exit_code", stop_ours),
        mock.patch.object(sys, "argv", argv or sys.argv),
    ):
        warnings.simplefilter("ignore")  # a module for -m may be imported already
        try:
            run()
        except _Parsed as found:
            return found.options
        except SystemExit as stopped:
            raise AssertionError(f"refused with exit code {stopped.code}") from stopped
    raise AssertionError("it reads no options")


def runnable(block: Block, known: set[str]) -> Any:
    """The statements of a block that run here, compiled; ``known`` are the names that are there before."""
    body = []
    for statement in block.statements:
        so_far = set(known)
        is_import = isinstance(statement, (ast.Import, ast.ImportFrom))
        if block.mark == "not run" and not is_import:
            continue
        if not unknown_names(statement, so_far) or block.mark is None:
            known = so_far
            body.append(statement)
    return compile(ast.Module(body, type_ignores=[]), block.where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
