"""Flags of a command line: both ways to write a value, dashes or underscores, and what is no flag."""

from __future__ import annotations

import pytest

from omni_sp.command_line import CommandLine, split_flag, with_dashes
from omni_sp.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--ring_degree=2", ("--ring-degree", "2")),
        ("--ring-degree", ("--ring-degree", None)),
        ("--name=a_b=c\nd", ("--name", "a_b=c\nd")),
        ("--api-key=", ("--api-key", "")),
        ("--additional_config.some_key=1", ("--additional-config.some-key", "1")),
        ("-tp=2", ("-tp", "2")),
        ("-5", ("-5", None)),
        ("--- a_b", ("--- a_b", None)),
        ("a_b=c", ("a_b=c", None)),
    ],
)
def test_a_flag_is_split_from_its_value(word: str, flag: tuple[str, str | None]) -> None:
    assert split_flag(word) == flag
    name, value = flag
    assert with_dashes(word) == (name if value is None else f"{name}={value}")


def test_flags_are_taken_in_any_order() -> None:
    line = CommandLine(["serve", "M", "--tensor_parallel_size=2", "--eager", "-sp", "3", "--name", "a", "-sp=4"])
    assert line.positional_after("serve") == "M"
    assert line.number_of("--sequence-size", "-sp") == 4, "the last one counts"
    assert line.flags() == ["--tensor-parallel-size", "--eager", "-sp", "--name", "-sp"]
    assert line.take_number("--sequence-size", "-sp") == 4
    assert (line.take_switch("--eager"), line.take_switch("--eager")) == (True, False)
    assert line.value_of("--tensor-parallel-size") == "2"
    assert line.take_value("--unknown") is None
    assert line.rest == ["serve", "M", "--tensor_parallel_size=2", "--name", "a"]


def test_a_value_that_is_missing_or_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="--size needs a value"):
        CommandLine(["--size"]).take_value("--size")
    with pytest.raises(ConfigError, match="--size two: give a whole number"):
        CommandLine(["--size=two"]).take_number("--size")
    with pytest.raises(ConfigError, match="--eager=false: --eager takes no value"):
        CommandLine(["--eager", "--eager=false"]).take_switch("--eager")
