"""What a call does besides taking time: the memory it needs, and how much of its time goes to exchanges."""

from __future__ import annotations

import cProfile
import ctypes
import gc
import pstats
from collections.abc import Callable
from pathlib import Path

import torch

_MOVING = ("omni_sp/attention/ulysses.py", "omni_sp/attention/packing.py", "omni_sp/collectives.py")
_COMPOSING = ("omni_sp/attention/overlap.py", "omni_sp/attention/ring.py")


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that a call needs at its peak beyond what was in use before; None where the system does not report it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Memory that was freed but kept for later would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def exchange_share(call: Callable[[], object]) -> float:
    """The share of a call's time that packing, sending, waiting for other ranks and unpacking take."""
    profile = cProfile.Profile()
    profile.runcall(call)
    stats = pstats.Stats(profile)
    moving = 0.0
    for (file, _, _), (_, _, _, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        if file.endswith(_MOVING):
            moving += sum(entry[3] for caller, entry in callers.items() if caller[0].endswith(_COMPOSING))
    return moving / stats.total_tt  # type: ignore[attr-defined,no-any-return]
