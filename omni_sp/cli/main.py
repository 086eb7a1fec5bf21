"""The entry of the ``omni-sp`` command. Whatever goes wrong is one line on stderr and an exit code.

Exit codes: 0 done; 1 a failure; 2 bad input; 130 Ctrl-C; 141 nobody reads the output any more, as under ``| head``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omni_sp import __version__
from omni_sp.cli import commands
from omni_sp.cli.embedding_options import SERVE_EMBEDDINGS
from omni_sp.cli.options import CHECK, DOCTOR, GENERATE, INFO, MODELS, PLAN, SERVE, Option
from omni_sp.command_line import BAD_INPUT, FAILED, INTERRUPTED, UNREAD, close_unread, with_dashes
from omni_sp.errors import InvalidInputError, OmniSPError, shortened
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.validation import suggestion

_LONGEST_MESSAGE = 2000
_Command = Callable[[argparse.Namespace], int]
_COMMANDS: tuple[tuple[str, str, _Command, tuple[Option, ...]], ...] = (
    ("generate", "draw pictures, videos or sounds", commands.generate, GENERATE),
    ("check", "compare one process with several ranks on small inputs, stage by stage", commands.check, CHECK),
    ("doctor", "say whether this machine is set up for ranks, measure it and prove it", commands.doctor, DOCTOR),
    ("info", "say what a picture was drawn with", commands.info, INFO),
    ("models", "list the transformer classes of diffusers, and what is proven of each", commands.models, MODELS),
    ("plan", "predict which degrees pay for a model on given devices", commands.plan, PLAN),
    ("serve", "answer OpenAI's clients over HTTP", commands.serve, SERVE),
    (
        "serve-embeddings",
        "embed texts over HTTP with several replicas of vLLM; all flags of `vllm serve` are passed on",
        commands.serve_embeddings,
        SERVE_EMBEDDINGS,
    ),
)
_PASSES_ON = ("serve-embeddings",)
"""Commands that take unknown options as well, for another program."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and end the program."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {shortened(message, _LONGEST_MESSAGE)}\n")

    def refuse(self, unknown: str) -> NoReturn:
        """Print that there is no such option and end the program."""
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"no option {unknown}; {suggestion(unknown, options, f'see {self.prog} --help')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``omni-sp``.

    Args:
        arguments: without the program's name; None for those of this program.

    Returns:
        The exit code.

    Raises:
        SystemExit: after ``--help`` or ``--version``, or for words that are no options.
    """
    parser = _Parser(prog="omni-sp", description="Any diffusers pipeline over several processes or GPUs, exactly.")
    parser.add_argument("--version", action="version", version=f"omni-sp {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, text, command, options in _COMMANDS:
        description = f"{text[0].upper()}{text[1:]}."
        _add_options(
            subparsers.add_parser(name, help=text, description=description, allow_abbrev=False), command, options
        )
    subparsers.add_parser("serve-llm", help="vLLM's server for language models, with our flags", add_help=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["serve-llm"]:
        return _exit_code(commands.serve_llm, argparse.Namespace(words=words[1:], debug=False))
    return _run(parser, words)


def example(
    description: str,
    *,
    model: str = SHAPES_MODEL,
    needs_image: bool = False,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run ``omni-sp generate`` as a program of its own, with defaults of its own.

    Args:
        description: text of ``--help``.
        model: default of ``--model``.
        needs_image: refuse to begin without ``--image``.
        arguments: without the program's name; None for those of this program.

    Returns:
        The exit code.

    Raises:
        SystemExit: after ``--help``, or for words that are no options.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    _add_options(parser, commands.generate, GENERATE)
    parser.set_defaults(model=model, needs_image=needs_image)
    return _run(parser, sys.argv[1:] if arguments is None else arguments)


def _add_options(parser: _Parser, command: _Command, options: Sequence[Option]) -> None:
    parser.set_defaults(run=command, parser=parser, needs_image=False)
    for option in options:
        parser.add_argument(*option.flags, **option.argparse)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")


def _run(parser: _Parser, words: Sequence[str]) -> int:
    """Parse, run the command, and turn every error into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × must not end a run
    try:
        options, unknown = parser.parse_known_args([with_dashes(word) for word in words])
        if unknown and getattr(options, "command", None) not in _PASSES_ON:
            options.parser.refuse(unknown[0])
        options.passed_on, options.words = unknown, words
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]  # its other arguments are not looked at
            return _exit_code(options.run, options)
    finally:
        close_unread()  # --help, too, may be longer than what is read of it


def _exit_code(command: _Command, options: argparse.Namespace) -> int:
    try:
        return command(options)
    except KeyboardInterrupt:
        return _exit_with(options, "stopped by Ctrl-C", INTERRUPTED)
    except InvalidInputError as error:
        return _exit_with(options, str(error), BAD_INPUT)
    except OmniSPError as error:
        return _exit_with(options, str(error), FAILED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and close_unread():
            return UNREAD
        return _exit_with(options, f"{type(error).__name__}: {error}", FAILED)


def _exit_with(options: argparse.Namespace, message: str, exitcode: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        if options.debug:
            traceback.print_exc()
        saved: list[Path] = getattr(options, "saved", [])
        kept = f" (finished before and kept: {', '.join(map(str, saved))})" if saved else ""
        what = message if exitcode == INTERRUPTED else f"error: {message}"
        print(f"omni-sp: {' '.join(what.split())}{kept}", file=sys.stderr, flush=True)
    return exitcode


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as a line for people, without the line of code that Python adds."""
    print(f"omni-sp: note: {' '.join(str(message).split())}", file=sys.stderr)
