"""Variables of the environment that do harm to ranks."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterator, Mapping

from omni_sp.doctor.findings import Finding
from omni_sp.machine import num_cores

JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
# Name -> for which values it does harm (a pattern), what that means, and what to do, or what to add to "unset NAME".
_HARMFUL: Mapping[str, tuple[str, str, str]] = {
    "NCCL_P2P_DISABLE": ("1", "GPUs send through host memory, not directly to each other: NVLink is not used", ""),
    "NCCL_SHM_DISABLE": ("1", "GPUs without peer access send through network sockets of this machine", ""),
    "NCCL_IB_DISABLE": ("1", "several machines talk over Ethernet, where they have InfiniBand", "unless it has none"),
    "NCCL_NET_GDR_LEVEL": ("0|LOC", "what goes to another machine is copied through host memory", ""),
    "NCCL_DEBUG": ("INFO|TRACE", "NCCL writes many lines for each rank, which costs time at the start", "use WARN"),
    "NCCL_ALGO": (".+", "NCCL does not choose its algorithm by what connects the GPUs", ""),
    "NCCL_PROTO": (".+", "NCCL does not choose its protocol by the size of a message", ""),
    "NCCL_LAUNCH_MODE": ("GROUP", "exchanges wait for each other", ""),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits for every exchange: none hides behind attention", ""),
    "NCCL_BLOCKING_WAIT": ("1", "the host waits for every exchange: none hides behind attention", ""),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "ranks that lost another one wait for ever", ""),
    "NCCL_ASYNC_ERROR_HANDLING": ("0", "ranks that lost another one wait for ever", ""),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL|INFO", "torch compares all ranks at every exchange", ""),
    "CUDA_LAUNCH_BLOCKING": ("1", "the host waits for every kernel: a step takes several times as long", ""),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor is allocated by the driver: a step takes far longer", ""),
    "NVIDIA_TF32_OVERRIDE": ("1", "float32 is computed in 10 bits of mantissa: results are not exact", ""),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1", "float32 is computed in 10 bits: results are not exact", ""),
    "OMNI_SP_CHECK": (
        "1",
        "ranks compare what they hold at every call: slower, to look for errors",
        "if that is not meant",
    ),
    "OMNI_SP_SHARED_MEMORY": ("0", "CPU ranks exchange by sockets, which is slower", ""),
}


def variable_findings(
    environ: Mapping[str, str], ranks: int, interfaces: Collection[str], cores: int | None = None
) -> list[Finding]:
    """Variables of the environment that do harm.

    Args:
        environ: the environment.
        ranks: how many ranks there would be on this machine.
        interfaces: names of its network interfaces.
        cores: CPU cores that this process may run on; None to ask.
    """
    found = [*_job_variables(environ), *_interface_variables(environ, interfaces)]
    for name, (values, meaning, advice) in _HARMFUL.items():
        value = environ.get(name, "")
        if re.fullmatch(values, value, re.IGNORECASE):
            remedy = advice if advice.startswith("use") else f"unset {name}"
            remedy += f", {advice}" if advice and not advice.startswith("use") else ""
            found.append(Finding("warning", "environment", f"{name}={value}", meaning, remedy))
    threads, cores = environ.get("OMP_NUM_THREADS", ""), cores or num_cores()
    if threads.isdigit() and int(threads) * ranks > max(cores, ranks):
        found.append(
            Finding(
                "warning",
                "environment",
                f"OMP_NUM_THREADS={threads} for {ranks} ranks on {cores} cores",
                f"{int(threads) * ranks} threads share {cores} cores: on the CPU ranks wait for each other",
                f"set OMP_NUM_THREADS={max(1, cores // ranks)}, or unset it",
            )
        )
    if not found:
        found.append(Finding("ok", "environment", "no variable of it does harm", "ranks start as they are meant to"))
    return found


def _job_variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that say that this process is a rank of a job, which it is not."""
    present = [name for name in JOB if name in environ]
    local = [name for name in _LOCAL if name in environ]
    if not present and not local:
        return
    shown = ", ".join(f"{name}={environ[name]}" for name in (*present, *local))
    unset = f"unset {' '.join((*present, *local))}"
    if len(present) == len(JOB) and environ["WORLD_SIZE"] != "1":
        yield Finding(
            "error",
            "environment",
            f"{shown} are set",
            f"Omni takes this process for rank {environ['RANK']} of a job of {environ['WORLD_SIZE']}, and waits for "
            "the others",
            f"if there is no such job, {unset}; if there is one, ask the doctor outside of it",
        )
        return
    are = "is" if len(present) + len(local) == 1 else "are"
    missing = [name for name in JOB if name not in environ]
    without = f" without {', '.join(missing)}" if missing else ""
    yield Finding(
        "warning",
        "environment",
        f"{shown} {are} set{without}",
        "left over from another job: Omni passes it over, and torch.distributed, accelerate and other programs take "
        "this process for one of several, and wait or fail",
        unset,
    )


def _interface_variables(environ: Mapping[str, str], interfaces: Collection[str]) -> Iterator[Finding]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name interfaces: NCCL prefixes of names, gloo whole names."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(name, "")
        words = [word for word in value.lstrip("^=").split(",") if word]
        if not words or value.startswith("^") or not interfaces:
            continue
        is_whole = name.startswith("GLOO") or value.startswith("=")
        if any(one == word or (one.startswith(word) and not is_whole) for one in interfaces for word in words):
            continue
        yield Finding(
            "error",
            "environment",
            f"{name}={value} names no network interface of this machine ({', '.join(sorted(interfaces))})",
            "ranks cannot reach each other: they fail at the start",
            f"unset {name}, or name one of these",
        )


def network_interfaces() -> list[str]:
    """Their names; empty where the system does not tell."""
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []
