"""``--help`` of every command says what each option does, and its default."""

from __future__ import annotations

import inspect
import re

import pytest

from omni_sp import AsyncOmni, DiffusionParallelConfig
from omni_sp.cli import example, main
from omni_sp.cli.embedding_options import SERVE_EMBEDDINGS
from omni_sp.cli.options import CHECK, DOCTOR, ENGINE, GENERATE, INFO, MODELS, PLAN, SERVE, Option
from omni_sp.requests import engine_options

COMMANDS = {
    "generate": GENERATE,
    "check": CHECK,
    "doctor": DOCTOR,
    "info": INFO,
    "models": MODELS,
    "plan": PLAN,
    "serve": SERVE,
    "serve-embeddings": SERVE_EMBEDDINGS,
}


def shown_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """The help of each option and argument, on one line, by its first flag or its name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"  (--?[\w-]+|[A-Z]+)(?=[ ,]|$)", line):
            _, _, found[match[1]] = line.strip().partition("  ")  # flags that are long have it on the next line
        elif line.startswith(" ") and (name_of_last := next(reversed(found), "")):
            found[name_of_last] += f" {line.strip()}"
    return {name: " ".join(words.split()) for name, words in found.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_says_what_it_does_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = entries(shown_help(capsys, command))
    for option in COMMANDS[command]:
        words = shown[option.argparse["metavar"] if not option.flags[0].startswith("-") else option.flags[0]]
        is_required = not option.flags[0].startswith("-") and "nargs" not in option.argparse
        match = re.fullmatch(r"(.+?) \(default: (.+)\)", words)
        if is_required:
            assert words, option.flags
            continue
        assert match is not None, f"{option.flags}: {words!r}"
        default = option.argparse.get("default")
        if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
            assert match[2] == (f"{default:g}" if isinstance(default, float) else str(default)), option.flags
    assert len(shown) >= len(COMMANDS[command])


def default_of(option: Option) -> object:
    """What the option's owner has where it is not given."""
    for signature in (inspect.signature(AsyncOmni), inspect.signature(engine_options)):
        if option.field in signature.parameters:
            return signature.parameters[option.field].default
    raise AssertionError(f"nothing takes {option.field}")


def test_defaults_are_those_of_what_takes_them() -> None:
    options = {option.field: option for table in (GENERATE, SERVE) for option in table}
    for option in options.values():
        default = option.argparse.get("default")
        if option.owner == ENGINE and default not in (None, []):
            assert option.convert(default) == default_of(option), option.flags
        if option.owner == "degrees":
            assert default == getattr(DiffusionParallelConfig(), option.field)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In its own help, as in that of all commands."""
    of_all = " ".join(shown_help(capsys).split())
    description = " ".join(shown_help(capsys, command).split("\n\n")[1].split())
    assert len(description.split()) >= 4
    assert description.endswith(".")
    assert description[1:-1] in of_all


def test_help_of_serve_llm_needs_no_vllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["serve-llm", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--enable-shift-parallel" in shown
    assert "pip install '.[vllm]'" in shown
    assert main(["serve-llm", "tiny"]) == 2
    assert "vLLM is not installed here" in capsys.readouterr().err


def test_an_example_shows_the_default_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("Draw.", model="some/model", arguments=["--help"])
    assert entries(capsys.readouterr().out)["--model"].endswith("(default: some/model)")
