"""The command as a program: its version, and output that nobody reads to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import omni_sp
import omni_sp.cli
from omni_sp.command_line import UNREAD
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--width", "64", "--height", "64", "--num-inference-steps", "2"]
RANKS = ["--ulysses-degree", "2"]
PROMPTS = ["--prompt", "a red circle", "--prompt", "a star"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "omni_sp", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_unread(cwd: Path, *words: str, with_errors: bool = False) -> tuple[int, str]:
    """The exit code of a program whose output has no reader, and what it says on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if with_errors else subprocess.PIPE
    try:
        done = subprocess.run(
            command(*words),
            cwd=cwd,
            env=environment(),
            stdout=writer,
            stderr=errors,
            text=True,
            timeout=150,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["serve", "--help"], ["generate", "--help"]])
def test_help_may_be_read_in_part(words: list[str], tmp_path: Path) -> None:
    assert run_unread(tmp_path, *words) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["models"],
        pytest.param(["check", "omni-sp/shapes", *SMALL, *RANKS], marks=thorough_only),
    ],
    ids=" ".join,
)
def test_a_command_ends_quietly_when_nobody_reads_it(words: list[str], tmp_path: Path) -> None:
    exitcode, errors = run_unread(tmp_path, *words)
    assert exitcode == UNREAD
    assert [line for line in errors.splitlines() if not line.startswith("omni-sp: starting ")] == []


@pytest.mark.parametrize("ranks", [[], pytest.param(RANKS, marks=thorough_only)], ids=" ".join)
def test_pictures_are_written_when_nobody_reads_about_them(ranks: list[str], tmp_path: Path) -> None:
    exitcode, errors = run_unread(tmp_path, "generate", *PROMPTS, *SMALL, *ranks, "--output", "pictures")
    assert exitcode == 0
    assert [line for line in errors.splitlines() if not line.startswith("omni-sp: starting ")] == []
    assert len(list((tmp_path / "pictures").iterdir())) == len(PROMPTS) // 2


def test_errors_that_nobody_reads_keep_their_exit_code(tmp_path: Path) -> None:
    assert run_unread(tmp_path, "generate", with_errors=True) == (2, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_options: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("omni_sp.cli.commands.serve_llm", broken)
    assert omni_sp.cli.main(["serve-llm", "tiny"]) == 1
    assert capsys.readouterr().err == "omni-sp: error: BrokenPipeError: [Errno 32] Broken pipe\n"


def test_the_version_is_the_packages() -> None:
    done = subprocess.run(
        command("--version"), env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"omni-sp {omni_sp.__version__}\n", "")
