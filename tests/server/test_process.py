from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest

from omni_sp import AsyncOmni, DiffusionParallelConfig, cli
from omni_sp.cli.options import SERVE
from omni_sp.command_line import BAD_INPUT
from omni_sp.errors import EngineClosedError, RankFailedError
from omni_sp.requests import engine_options
from omni_sp.server.process import listening, run_server
from omni_sp.server.settings import ServerSettings
from tests.server.fakes import FakeOmni, held
from tests.server.serving import PATIENCE_S, until


def main(arguments: list[str]) -> int:
    """The exit code of ``omni-sp serve``."""
    return cli.main(["serve", *arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == BAD_INPUT
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in one_line(capsys)
    assert main(["--port", "0", "--host", "no.such.host.invalid"]) == BAD_INPUT
    assert "no.such.host.invalid" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such/model"], "no folder"),
        (["--port", "70000"], "port=70000"),
        (["--warmup", "large"], "HEIGHTxWIDTH"),
        (["--usp", "0"], "ulysses_degree=0"),
        (["--max-steps", "0"], "max_steps=0"),
        (["--api-key", ""], "API key"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--device", "abacus"], "abacus"),
        (["--rank-timeout", "-1"], "rank_timeout_s"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == BAD_INPUT
    assert words in one_line(capsys)


def test_a_key_file_without_keys_lets_nobody_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n \n")
    assert main(["--api-key-file", str(empty)]) == BAD_INPUT
    assert "no key" in one_line(capsys)


def test_a_data_folder_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data"
    file.write_text("x")
    assert main(["--port", "0", "--data-dir", str(file)]) == BAD_INPUT
    assert str(file) in one_line(capsys)


def test_the_module_runs_the_command() -> None:
    program = [sys.executable, "-m", "omni_sp.server", "--max_stepps", "3"]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == BAD_INPUT
    assert ended.stderr == "omni-sp serve: error: no option --max-stepps; did you mean --max-steps?\n"


def test_every_option_reaches_what_takes_it() -> None:
    for option in SERVE:
        match option.owner:
            case "server":
                known = {field.name for field in fields(ServerSettings)}
            case None:  # the command, which chooses the degrees by it
                known = {"parallel"}
            case "degrees":
                known = set(inspect.signature(DiffusionParallelConfig).parameters)
            case _:
                known = {*inspect.signature(AsyncOmni).parameters, *inspect.signature(engine_options).parameters}
        assert option.field in known, option.flags


def run(omni: FakeOmni, after_start: Callable[[str], None], **settings: Any) -> int:
    """Serve in this thread; ``after_start`` is called in another with the URL, once the server listens."""
    with listening("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        failures: list[BaseException] = []

        def follow() -> None:
            try:
                httpx2.get(f"{url}/health", timeout=PATIENCE_S, trust_env=False)  # signal handlers come before this
                after_start(url)
            except BaseException as error:
                failures.append(error)
                if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # the server still runs
                    os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            return asyncio.run(asyncio.wait_for(run_server(omni, ServerSettings(**settings), listener), PATIENCE_S))
        finally:
            thread.join(PATIENCE_S)
            assert not failures, failures


def status(url: str) -> str:
    return str(httpx2.get(f"{url}/health", timeout=PATIENCE_S, trust_env=False).json()["status"])


def draw(url: str) -> httpx2.Response:
    body = {"prompt": "x"}
    return httpx2.post(f"{url}/v1/images/generations", json=body, timeout=PATIENCE_S, trust_env=False)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_a_signal_drains(number: signal.Signals, exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    omni = held()
    answers: dict[str, httpx2.Response] = {}

    def after_start(url: str) -> None:
        until(lambda: status(url) == "ready")
        threads = [threading.Thread(target=lambda n=name: answers.update({n: draw(url)})) for name in "ab"]
        for place, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda count=place: len(omni.requests) == count)  # type: ignore[misc]
        os.kill(os.getpid(), number)
        until(lambda: status(url) == "draining")
        if number == signal.SIGHUP:  # a closed terminal's second one hurries nobody
            os.kill(os.getpid(), number)
        assert draw(url).status_code == 503
        until(lambda: "b" in answers)
        assert "a" not in answers
        omni.go_on.set()
        for thread in threads:
            thread.join(PATIENCE_S)

    assert run(omni, after_start) == exit_code
    assert (answers["a"].status_code, answers["b"].status_code) == (200, 503)
    printed = capsys.readouterr()
    assert "listening on http://127.0.0.1:" in printed.out
    assert "is ready after" in printed.out
    assert "stopping: 1 request may finish, for up to " in printed.err


def test_where_hangups_are_ignored_they_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it

    def after_start(url: str) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: status(url) == "ready")
        assert draw(url).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert run(FakeOmni(), after_start) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_a_drain_has_an_end(how: str, caplog: pytest.LogCaptureFixture) -> None:
    omni = held()
    answers: list[httpx2.Response] = []

    def after_start(url: str) -> None:
        until(lambda: status(url) == "ready")
        thread = threading.Thread(target=lambda: answers.append(draw(url)))
        thread.start()
        until(lambda: omni.requests)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: omni.status == "draining")
        if how == "second signal":
            os.kill(os.getpid(), signal.SIGTERM)
        thread.join(PATIENCE_S)

    assert run(omni, after_start, drain_timeout_s=60.0 if how == "second signal" else 0.2) == 0
    assert [answer.status_code for answer in answers] == [503]
    assert "Traceback" not in caplog.text


def test_a_start_that_fails_ends_the_server() -> None:
    answered = threading.Event()
    omni = FakeOmni(start_on=answered, start_error=RankFailedError("no memory", rank=0))
    with pytest.raises(RankFailedError, match="no memory"):
        run(omni, lambda _url: answered.set())


def test_ranks_that_do_not_come_back_end_the_server() -> None:
    omni = FakeOmni()

    def after_start(url: str) -> None:
        until(lambda: status(url) == "ready")
        omni.force_status = "failed"

    with pytest.raises(EngineClosedError, match="did not start again"):
        run(omni, after_start)


def test_a_signal_while_it_loads() -> None:
    assert run(FakeOmni(start_s=PATIENCE_S), lambda _url: os.kill(os.getpid(), signal.SIGTERM)) == 0
