"""Variables, limits, shared memory, ports, packages and caches that do harm; and a sabotaged environment as a whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omni_sp.doctor import system
from omni_sp.doctor.findings import Finding
from omni_sp.doctor.variables import variable_findings

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def variables(**environ: str) -> list[Finding]:
    return variable_findings(environ, 2, ["lo", "eth0"], 8)


def test_nothing_that_does_harm() -> None:
    (one,) = variables(NCCL_DEBUG="WARN", CUDA_LAUNCH_BLOCKING="0", NCCL_SOCKET_IFNAME="eth", OMP_NUM_THREADS="4")
    assert one.level == "ok"


@pytest.mark.parametrize(
    ("environ", "level", "what", "remedy"),
    [
        (
            {"WORLD_SIZE": "4"},
            "warning",
            "WORLD_SIZE=4 is set without RANK, MASTER_ADDR, MASTER_PORT",
            "unset WORLD_SIZE",
        ),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "warning", "RANK=1, LOCAL_RANK=1 are set without WORLD_SIZE, MASTER_ADDR, "
         "MASTER_PORT", "unset RANK LOCAL_RANK"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "error",
            "RANK=1, WORLD_SIZE=2, MASTER_ADDR=localhost, MASTER_PORT=29500 are set",
            "if there is no such job, unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT; if there is one, ask the doctor "
            "outside of it",
        ),
        ({"NCCL_P2P_DISABLE": "1"}, "warning", "NCCL_P2P_DISABLE=1", "unset NCCL_P2P_DISABLE"),
        ({"NCCL_IB_DISABLE": "1"}, "warning", "NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE, unless it has none"),
        ({"NCCL_DEBUG": "info"}, "warning", "NCCL_DEBUG=info", "use WARN"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "warning", "CUDA_LAUNCH_BLOCKING=1", "unset CUDA_LAUNCH_BLOCKING"),
        ({"OMNI_SP_SHARED_MEMORY": "0"}, "warning", "OMNI_SP_SHARED_MEMORY=0", "unset OMNI_SP_SHARED_MEMORY"),
        (
            {"NCCL_SOCKET_IFNAME": "ib0"},
            "error",
            "NCCL_SOCKET_IFNAME=ib0 names no network interface of this machine (eth0, lo)",
            "unset NCCL_SOCKET_IFNAME, or name one of these",
        ),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "error", "GLOO_SOCKET_IFNAME=eth names no network interface of this machine "
         "(eth0, lo)", "unset GLOO_SOCKET_IFNAME, or name one of these"),
        ({"OMP_NUM_THREADS": "8"}, "warning", "OMP_NUM_THREADS=8 for 2 ranks on 8 cores", "set OMP_NUM_THREADS=4, or "
         "unset it"),
    ],
)  # fmt: skip
def test_a_variable_that_does_harm(environ: dict[str, str], level: str, what: str, remedy: str) -> None:
    (one,) = variables(**environ)
    assert (one.level, one.what, one.remedy) == (level, what, remedy)
    assert one.meaning


def test_a_job_of_one_is_no_job() -> None:
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert [one.level for one in variables(**job)] == ["warning"]


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (system.shared_memory_findings(64 << 20, 64 << 20, has_anonymous=True), "warning", "64 MiB free of 64 MiB"),
        (system.shared_memory_findings(8 * GIB, 1 << 20, has_anonymous=True), "warning", "1.0 MiB free of 8.0 GiB"),
        (system.shared_memory_findings(None, 0, has_anonymous=True), "warning", "no /dev/shm"),
        (system.shared_memory_findings(8 * GIB, 8 * GIB, has_anonymous=True), "ok", "8.0 GiB free"),
        (system.file_limit_findings(64, 4096, 2), "error", "64 files"),
        (system.file_limit_findings(256, 4096, 2), "warning", "256 files"),
        (system.file_limit_findings(1024, 4096, 2), "ok", "1024 files"),
        (system.file_limit_findings(-1, -1, 2), "ok", "any number of files"),
        (system.core_findings(1, 2, on_cpu=True), "warning", "2 ranks on 1 core"),
        (system.core_findings(8, 2, on_cpu=False), "ok", "8 cores"),
        (system.port_findings([8091]), "note", "port 8091 is taken"),
        (system.port_findings([]), "ok", "8091 and 29500 are free"),
        (system.port_findings([], loopback=False), "error", "no port of 127.0.0.1"),
        (system.version_findings({"diffusers": "0.42.1"}), "error", "transformers is not installed"),
        (system.version_findings({"diffusers": "0.99.0", "transformers": "5.1.0"}), "note", "diffusers 0.99.0: the"),
        (system.version_findings({"diffusers": "0.42.0", "transformers": "5.1.0"}), "ok", "diffusers 0.42.0"),
        (system.cache_findings(Path("hub"), 9 * GIB, (), is_writable=True), "note", "9.0 GiB are free at hub"),
        (system.cache_findings(Path("hub"), None, (), is_writable=False), "warning", "hub cannot be written to"),
        (system.cache_findings(Path("hub"), 99 * GIB, (5, 6), is_writable=True), "note", "2 downloads were cut off"),
    ],
)
def test_limits_and_places(found: list[Finding], level: str, words: str) -> None:
    (one,) = found
    assert one.level == level
    assert words in one.what
    assert one.meaning
    assert one.remedy


def test_without_anonymous_memory() -> None:
    found = system.shared_memory_findings(8 * GIB, 8 * GIB, has_anonymous=False)
    assert [one.level for one in found] == ["ok", "note"]


def test_a_raised_hard_limit_needs_root() -> None:
    (one,) = system.file_limit_findings(64, 64, 2)
    assert one.remedy.startswith("raise the hard limit (64) as root")


def test_a_package_that_cannot_be_imported() -> None:
    def load(name: str) -> object:
        raise OSError(f"{name}: undefined symbol: _ZN3c10")

    (one,) = system.package_findings({"flash_attn_2": ("json",), "absent": ("no_such_package",)}, load)
    assert one.what == "json is installed and cannot be imported: OSError: json: undefined symbol: _ZN3c10"
    assert one.meaning.startswith("the kernel flash_attn_2 is passed over")


SABOTAGE = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && ulimit -n 64 && exec "$@"'


def can_unshare() -> bool:
    program = shutil.which("unshare")
    if program is None:
        return False
    tried = [program, "--mount", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    return subprocess.run(tried, capture_output=True, timeout=20, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="a small /dev/shm needs a mount namespace of its own (unshare, as root)")
def test_a_sabotaged_environment_is_found() -> None:
    """A stray WORLD_SIZE, a tiny /dev/shm, and 64 files: the command says all three."""
    command = [sys.executable, "-m", "omni_sp", "doctor", "--device", "cpu", "--quick", "--json"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "4"}
    words = ["unshare", "--mount", "sh", "-c", SABOTAGE, "sh", *command]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    found = {one["what"]: one for one in report["findings"] if one["level"] in ("warning", "error")}
    for words_of_one in ("WORLD_SIZE=4", "/dev/shm has", "64 files"):
        assert [what for what in found if words_of_one in what], (words_of_one, list(found))
    assert report["errors"] == 1
    assert report["measured"] is None
