"""CUDA tensors without a GPU: shapes, dtypes and devices, and no numbers.

torch's fake tensors run the same Python as real ones, so that the paths for CUDA are run on any machine: which kernel
is chosen, what is exchanged, what would wait for the device. A build of torch for CPUs lacks one thing for that, a
device guard for CUDA. One that does nothing is compiled once, in seconds, and kept in pytest's cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from omni_sp import DiffusionParallelConfig, ParallelMesh

aten = torch.ops.aten
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""
_WAITS = frozenset({aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.item})
"""The host waits for the numbers."""


class FakeCuda(FakeTensorMode):
    """While it is active, tensors are fake, and live on a CUDA device where the code wants them there.

    Attributes:
        waits: operators that read numbers from the device, or that move tensors between host and device, in order.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _WAITS:
            self.waits.append(str(func))
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            devices = {x.device.type for x in (result, *args) if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                self.waits.append(str(func))
        return result


def install_device_guard(folder: Path) -> None:
    """Let torch of a build for CPUs know a guard for CUDA devices; the test is skipped where it cannot be compiled.

    Args:
        folder: where the compiled library is kept.
    """
    if torch.backends.cuda.is_built():
        return  # which has one
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("fake CUDA tensors need a C++ compiler (c++, g++, or CXX), for a device guard that does nothing")
    root = Path(torch.__file__).parent
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    name = hashlib.sha256(repr((torch.__version__, command, _GUARD)).encode()).hexdigest()[:16]
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    with (folder / "lock").open("w") as lock:
        # Two workers may want it at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            source.write_text(_GUARD)
            unfinished = library.with_suffix(".unfinished")
            made = subprocess.run(
                [*command, str(source), "-o", str(unfinished), "-lc10"], capture_output=True, text=True, timeout=300
            )
            if made.returncode:
                pytest.skip(f"fake CUDA tensors: {compiler} cannot compile a device guard: {made.stderr[-300:]}")
            unfinished.replace(library)
    # To load it is to register the guard. It does nothing, so it stays.
    ctypes.CDLL(str(library))


@contextmanager
def fake_mesh(ulysses: int, ring: int = 1, *, rank: int = 0) -> Iterator[ParallelMesh]:
    """A mesh in which this process is one rank and the others are absent: nothing is exchanged."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ulysses * ring)
    try:
        yield ParallelMesh(DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
    finally:
        dist.destroy_process_group()


def on_cuda(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Arguments with a fake CUDA tensor for each tensor; floating-point ones in ``dtype``."""

    def move(x: torch.Tensor) -> torch.Tensor:
        chosen = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return torch.empty_strided(x.shape, x.stride(), dtype=chosen, device="cuda")

    return tree_map_only(torch.Tensor, move, value)
