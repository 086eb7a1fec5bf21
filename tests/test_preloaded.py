"""The command of tests/preloaded.py does what ``python`` does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.processes import alive, becomes_true
from tests.preloaded import python

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the command is python itself elsewhere")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-c", "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(3)", "a"], (3, "['a'] read\n", "")),
        (["-c", "import sys; sys.exit('words')"], (1, "", "words\n")),
        (["-u", "program.py", "b"], (0, "program.py ['b'] __main__\n", "")),
        (["-m", "module"], (0, "__main__\n", "")),
        (["-c", "import os, omni_sp; print(os.getcwd(), omni_sp.__file__)"], None),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], (-9, "", "")),
        (["-c", "import atexit; atexit.register(print, 'the end')"], (0, "the end\n", "")),
        (["-S", "-c", "import sys; print('torch' in sys.modules)"], (0, "False\n", "")),  # Python itself
    ],
)
def test_a_program_does_what_it_does_under_python(
    tmp_path: Path, words: list[str], expected: tuple[int, str, str] | None
) -> None:
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[0], sys.argv[1:], __name__)")
    (tmp_path / "module.py").write_text("print(__name__)")
    given = {"cwd": tmp_path, "env": ENVIRONMENT, "input": "read", "capture_output": True, "text": True}
    results = [
        subprocess.run([program, *words], **given, timeout=60, check=False)  # type: ignore[call-overload]
        for program in ((python(),) if expected else (python(), sys.executable))
    ]
    results = [(done.returncode, done.stdout, done.stderr) for done in results]
    assert results[0] == (expected or results[1])


def test_a_program_and_what_it_starts_have_torch_from_the_beginning() -> None:
    shown = "import sys, subprocess; print('torch' in sys.modules, flush=True)"
    program = f"{shown}; subprocess.run([sys.executable, '-c', {shown!r}])"
    done = subprocess.run([python(), "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\nTrue\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_program(sent: signal.Signals) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with subprocess.Popen([python(), "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(sent)
        assert process.wait(10) == -sent
    assert becomes_true(lambda: not alive(pid), 10.0)
