"""What surrounds a program that starts ranks: limits, shared memory, cores, ports, versions, the hub's cache."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from omni_sp.attention.kernels.optional import is_installed
from omni_sp.doctor.findings import Finding
from omni_sp.tested_versions import TESTED, is_tested

_SHM = Path("/dev/shm")
_SHM_LEAST = 1 << 30
_FILES_LEAST, _FILES_FEW = 128, 1024
_DISK_FEW = 60 << 30
PORTS = {8091: "omni-sp serve", 29500: "torchrun"}
"""Ports that commands take by default."""


def shared_memory_findings(total: int | None, free: int, *, has_anonymous: bool) -> list[Finding]:
    """Memory that processes of this machine share.

    Args:
        total: bytes of /dev/shm; None where there is none.
        free: how many of them are free.
        has_anonymous: whether ``memfd_create`` works, which CPU ranks exchange through.
    """
    found = []
    if total is None or free < _SHM_LEAST:
        size = "no /dev/shm" if total is None else f"/dev/shm has {_size(free)} free of {_size(total)}"
        found.append(
            Finding(
                "warning",
                "shared memory",
                size,
                "NCCL keeps its buffers there, and ends with a bus error or 'unhandled system error' when it is full; "
                "so do workers of data loaders",
                "start the container with --shm-size=8g or --ipc=host (in Kubernetes: an emptyDir of medium Memory at "
                "/dev/shm); elsewhere mount -o remount,size=8g /dev/shm as root",
            )
        )
    else:
        found.append(
            Finding("ok", "shared memory", f"{_size(free)} free in /dev/shm", "it is enough for NCCL's buffers")
        )
    if not has_anonymous:
        found.append(
            Finding(
                "note",
                "shared memory",
                "this system gives no anonymous shared memory (memfd_create)",
                "CPU ranks exchange by sockets, which is slower",
                "allow memfd_create in the container's seccomp profile; on macOS there is none",
            )
        )
    return found


def shared_memory_here() -> list[Finding]:
    """The same of this machine."""
    total, free = None, 0
    if _SHM.is_dir():
        state = os.statvfs(_SHM)
        total, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
    return shared_memory_findings(total, free, has_anonymous=_has_anonymous_memory())


def _has_anonymous_memory() -> bool:
    if not hasattr(os, "memfd_create"):
        return False
    try:
        os.close(os.memfd_create("omni-sp"))
    except OSError:
        return False
    return True


def file_limit_findings(soft: int, hard: int, ranks: int) -> list[Finding]:
    """How many files, sockets and shared memories a process may have open (``ulimit -n``).

    Args:
        soft: the limit that holds.
        hard: up to which it may be raised.
        ranks: how many ranks there would be.
    """
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= _FILES_FEW:
        return [Finding("ok", "file limit", f"a process may open {_count(soft)} files", "it is enough for many ranks")]
    raised = "ulimit -n 65536"
    if hard != unlimited and hard < _FILES_FEW:
        raised = f"raise the hard limit ({hard}) as root: nofile in /etc/security/limits.conf, or --ulimit nofile=65536"
    return [
        Finding(
            "error" if soft < _FILES_LEAST else "warning",
            "file limit",
            f"a process may open {soft} files (ulimit -n)",
            f"each of {ranks} ranks opens some for every other rank and for shared memory, and a server one for each "
            "client: it ends with 'Too many open files'",
            raised,
        )
    ]


def file_limit_here(ranks: int) -> list[Finding]:
    """The same of this process."""
    return file_limit_findings(*resource.getrlimit(resource.RLIMIT_NOFILE), ranks)


def core_findings(cores: int, ranks: int, *, on_cpu: bool) -> list[Finding]:
    """Whether there are cores for the ranks."""
    if cores >= ranks:
        meaning = f"each of {ranks} ranks has {cores // ranks}" if ranks > 1 else "they are this rank's"
        return [Finding("ok", "CPU", f"{cores} cores", meaning)]
    meaning = "ranks compute in turns, and several are slower than one" if on_cpu else "starting kernels waits its turn"
    return [
        Finding(
            "warning",
            "CPU",
            f"{ranks} ranks on {cores} {'core' if cores == 1 else 'cores'}",
            meaning,
            "give the container or the job more cores (--cpus, taskset), or start fewer ranks",
        )
    ]


def port_findings(taken: Collection[int], *, loopback: bool = True) -> list[Finding]:
    """Whether ranks can meet on this machine, and which usual ports other programs have.

    Args:
        taken: those of `PORTS` that are in use.
        loopback: whether a free port of 127.0.0.1 can be had.
    """
    if not loopback:
        return [
            Finding(
                "error",
                "ports",
                "no port of 127.0.0.1 can be opened",
                "ranks meet on one, and cannot start",
                "allow the loopback interface in the sandbox or container (ip link set lo up)",
            )
        ]
    if not taken:
        return [
            Finding("ok", "ports", f"{' and '.join(map(str, PORTS))} are free", "servers and torchrun can take them")
        ]
    return [
        Finding(
            "note",
            "ports",
            f"port {port} is taken by another program",
            f"{PORTS[port]} takes it by default, and fails",
            f"give it another one ({'--port' if port == 8091 else '--master-port'}), or end that program",
        )
        for port in sorted(taken)
    ]


def ports_here() -> list[Finding]:
    """The same of this machine."""
    return port_findings([port for port in PORTS if not _is_free(port)], loopback=_is_free(0))


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As servers do: a connection that has ended does not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def version_findings(installed: Mapping[str, str]) -> list[Finding]:
    """Whether the libraries beneath are of versions that the tests run with.

    Args:
        installed: package -> version, of those that are installed.
    """
    found = []
    for package in TESTED:
        oldest, newest = TESTED[package]
        if package not in installed:
            found.append(
                Finding(
                    "error", "versions", f"{package} is not installed", "no pipeline can be loaded",
                    f"pip install '{package}>={oldest}'",
                )
            )  # fmt: skip
            continue
        if not is_tested(package, installed[package]):
            found.append(
                Finding(
                    "note",
                    "versions",
                    f"{package} {installed[package]}: the tests run with {oldest} to {newest}",
                    "what is private to it may have changed: a model may be refused, or not be split",
                    "`omni-sp check MODEL --ulysses-degree 2` compares several ranks with one process",
                )
            )
    if not found:
        shown = ", ".join(f"{name} {version}" for name, version in installed.items())
        found.append(Finding("ok", "versions", shown, "the tests run with these"))
    return found


def installed_versions(packages: Sequence[str] = ("torch", *TESTED)) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def package_findings(
    modules: Mapping[str, Sequence[str]], load: Callable[[str], object] | None = None
) -> list[Finding]:
    """Whether the packages that attention kernels wrap can be imported, where they are installed.

    Args:
        modules: kernel -> the modules of which it needs one.
        load: imports a module.
    """
    load = load or importlib.import_module
    found = []
    for kernel, names in modules.items():
        for name in filter(is_installed, names):
            try:
                load(name)
            except Exception as error:  # a binary for another torch or another GPU may raise anything
                found.append(
                    Finding(
                        "warning",
                        "kernels",
                        f"{name} is installed and cannot be imported: {type(error).__name__}: {_line(error)}",
                        f"the kernel {kernel} is passed over, and attention may be slower than it could be",
                        f"install a build of {name.partition('.')[0]} for this torch, or remove it",
                    )
                )
    return found


def cache_findings(folder: Path, free: int | None, incomplete: Sequence[int], *, is_writable: bool) -> list[Finding]:
    """Where models of the hub are kept.

    Args:
        folder: of the hub's cache.
        free: bytes that are free on its disk; None where it cannot be asked.
        incomplete: bytes of each download that was cut off.
        is_writable: whether files can be made there.
    """
    if not is_writable:
        return [
            Finding(
                "warning",
                "hub's cache",
                f"{folder} cannot be written to",
                "models that are not in it yet cannot be downloaded",
                "set HF_HOME to a folder that can be written to",
            )
        ]
    found = []
    if free is not None and free < _DISK_FEW:
        found.append(
            Finding(
                "note",
                "hub's cache",
                f"{_size(free)} are free at {folder}",
                "large models have 30 to 130 GiB: a download may fill the disk",
                "set HF_HOME to a larger disk, or remove models with `hf cache rm`",
            )
        )
    if incomplete:
        found.append(
            Finding(
                "note",
                "hub's cache",
                f"{len(incomplete)} downloads were cut off ({_size(sum(incomplete))})",
                "they go on where a model is asked for again, and are on the disk until then",
                "nothing, or remove the files *.incomplete below the cache",
            )
        )
    if not found:
        space = "" if free is None else f", {_size(free)} free"
        found.append(Finding("ok", "hub's cache", f"{folder}{space}", "models are kept and found there"))
    return found


def cache_here() -> list[Finding]:
    """The same of this user's."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free: int | None = shutil.disk_usage(existing).free
    except OSError:
        free = None
    incomplete = [path.stat().st_size for path in folder.glob("models--*/blobs/*.incomplete")]
    return cache_findings(folder, free, incomplete, is_writable=os.access(existing, os.W_OK))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _count(limit: int) -> str:
    return "any number of" if limit == resource.RLIM_INFINITY else str(limit)


def _size(num_bytes: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if num_bytes >= 10 or unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024  # type: ignore[assignment]
    raise AssertionError
