"""What was measured on this machine, and the file that keeps it from one command to the next."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FORMAT = 1
_DEVICE_TYPES = ("cuda", "cpu")


@dataclass(frozen=True)
class Transfer:
    """Messages of one size.

    Attributes:
        num_bytes: that a rank sends to others.
        seconds: until all ranks have theirs.
    """

    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class KernelSpeed:
    """One attention kernel at the shape that was timed.

    Attributes:
        kernel: its name.
        dtype: of query, key and value.
        seconds: of one attention, the slowest rank's.
        tflops: 10^12 operations a second.
    """

    kernel: str
    dtype: str
    seconds: float
    tflops: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One machine, as its ranks measured it.

    Attributes:
        when: the time, in ISO 8601.
        host: the name of the machine.
        device_type: "cuda" or "cpu".
        device: the kind of device.
        num_devices: how many ranks there were, each on a device of its own.
        torch: its version.
        transport: what moved tensors between ranks: "shared memory", "gloo" or "nccl".
        model: whose shapes were timed.
        shape: of the attention that was timed, for people.
        attention_share: the part of the model's operations that its attention has.
        dtype: of what was timed.
        kernels: attention kernels, the fastest first.
        linear_tflops: 10^12 operations a second of a linear layer, the slowest rank's.
        exchange: all-to-alls by size; empty with one rank.
        ring: ring shifts by size; empty with one rank.
        memory_gb: of a device, in 10^9 bytes.
        memory_gb_per_s: what a copy in a device's memory reads and writes.
        host_gb_per_s: between a device and its host.
    """

    when: str
    host: str
    device_type: str
    device: str
    num_devices: int
    torch: str
    transport: str
    model: str
    shape: str
    attention_share: float
    dtype: str
    kernels: tuple[KernelSpeed, ...]
    linear_tflops: float
    exchange: tuple[Transfer, ...] = ()
    ring: tuple[Transfer, ...] = ()
    memory_gb: float
    memory_gb_per_s: float
    host_gb_per_s: float

    @property
    def tflops(self) -> float:
        """10^12 operations a second of the model's linear layers and attention together."""
        share = self.attention_share
        attention = self.kernels[0].tflops if self.kernels else self.linear_tflops
        return 1 / ((1 - share) / self.linear_tflops + share / attention)

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


def latency_and_bandwidth(transfers: Sequence[Transfer]) -> tuple[float, float]:
    """Seconds that a message takes beyond its bytes, and bytes a second: of the smallest message, and of the largest.

    Args:
        transfers: of several sizes.
    """
    smallest, largest = (pick(transfers, key=lambda one: one.num_bytes) for pick in (min, max))
    latency = smallest.seconds
    return latency, largest.num_bytes / max(largest.seconds - latency, largest.seconds / 10)


def measured_file(device_type: str) -> Path:
    """Where it is kept: below OMNI_SP_CACHE, or omni_sp in the user's folder of caches. A machine has files of its own.

    Args:
        device_type: "cuda" or "cpu".
    """
    named = os.environ.get("OMNI_SP_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(caches) / "omni_sp"
    host = re.sub(r"[^\w.-]", "_", platform.node()) or "machine"
    return folder / f"measured-{host}-{device_type}.json"


def save_measured(measured: Measured) -> Path:
    """Keep it, in place of what was measured before. Returns where.

    Args:
        measured: what was measured.

    Raises:
        OSError: the file cannot be written.
    """
    path = measured_file(measured.device_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another command may read it at the same time.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({"format": _FORMAT, **measured.as_dict()}, indent=1))
    unfinished.replace(path)
    return path


def load_measured(device_type: str | None = None) -> Measured | None:
    """What was measured on this machine; None where nothing was, or where another version has kept it.

    Args:
        device_type: "cuda" or "cpu"; None for GPUs, where they were measured.
    """
    for kind in _DEVICE_TYPES if device_type is None else (device_type,):
        try:
            kept = json.loads(measured_file(kind).read_text())
            if kept.pop("format") != _FORMAT:
                continue
            for name in ("exchange", "ring"):
                kept[name] = tuple(Transfer(**one) for one in kept[name])
            kept["kernels"] = tuple(KernelSpeed(**one) for one in kept["kernels"])
            return Measured(**kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
