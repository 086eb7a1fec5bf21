"""One examination of this machine: look, start ranks, measure, prove."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig
from omni_sp.doctor import system
from omni_sp.doctor.findings import Finding
from omni_sp.doctor.gpus import Smi, TorchCuda, ask_nvidia_smi, ask_torch, gpu_findings, parse_gpus, visible_gpus
from omni_sp.doctor.topology import parse_peer_access, parse_topology, topology_findings
from omni_sp.doctor.variables import network_interfaces, variable_findings
from omni_sp.engine.devices import check_device_name
from omni_sp.engine.messages import EngineOptions
from omni_sp.errors import ConfigError
from omni_sp.machine import num_cores
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.planner.measured import Measured, save_measured
from omni_sp.requests import engine_options
from omni_sp.validation import require_int, require_number
from omni_sp.version import __version__

if TYPE_CHECKING:
    from omni_sp.doctor.measure import Shape

OnStep = Callable[[str, int, int], None]
"""Called before each step: what it is, how many are done, and how many there are."""


@dataclass
class Report:
    """What an examination found.

    Attributes:
        device: of the ranks: "cpu", "cuda", or "cuda:N" for one that all share.
        ranks: how many there were, or would be.
        versions: package -> version.
        findings: in the order in which things were looked at.
        measured: what the ranks measured; None where none did.
        kept: where that is kept for `omni-sp plan --here`; "" where it is not.
    """

    device: str
    ranks: int
    versions: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    measured: Measured | None = None
    kept: str = ""

    @property
    def num_errors(self) -> int:
        """Findings of what fails, or gives wrong numbers."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def num_warnings(self) -> int:
        """Findings of what costs speed or may fail."""
        return sum(finding.level == "warning" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "omni_sp": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": self.device,
            "ranks": self.ranks,
            "versions": self.versions,
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "findings": [finding.as_dict() for finding in self.findings],
            "measured": None if self.measured is None else self.measured.as_dict(),
            "kept": self.kept,
        }


def examine(
    *,
    device: str | None = None,
    ranks: int | None = None,
    model: str | None = None,
    quick: bool = False,
    timeout_s: float = 120.0,
    on_step: OnStep = lambda text, done, total: None,
) -> Report:
    """Examine this machine.

    Args:
        device: "cpu", "cuda" for a GPU each, "cuda:0" and so on for one GPU that all share, or None for GPUs where
            there are any.
        ranks: how many; None for one on each GPU, or two on the CPU.
        model: at whose shapes kernels are timed, as `omni_sp.planner.model_cost` takes it; None for Qwen-Image.
        quick: look only, and start no ranks.
        timeout_s: the longest that ranks may take to start, or for one thing that they measure or prove, in seconds.
        on_step: called with each step.

    Raises:
        ConfigError: no such device or model, or a number out of range.
    """
    check_device_name(device)
    if ranks is not None:
        require_int("ranks", ranks, minimum=1, error=ConfigError, hint="give a whole number of at least 1")
    require_number("timeout_s", timeout_s, above=0, error=ConfigError, hint="give a number above 0")
    shape = None if quick else _shape(model)
    steps = 1 if quick else 7
    on_step("looking at the machine", 0, steps)
    torch_cuda, smi = ask_torch(), ask_nvidia_smi()
    device = device or ("cuda" if torch_cuda.num_devices else "cpu")
    if ranks is None:
        ranks = max(torch_cuda.num_devices, 1) if device == "cuda" else 2
    options = None if quick else options_for(device, ranks)
    report = Report(device, ranks, system.installed_versions())
    report.findings = look(smi, torch_cuda, ranks, device)
    if options is None or shape is None:
        return report
    from omni_sp.doctor.together import examine_ranks

    found, report.measured = examine_ranks(options, shape, timeout_s, lambda text, done: on_step(text, done, steps))
    report.findings += found
    _keep(report)
    return report


def options_for(device: str, ranks: int) -> EngineOptions:
    """Of the engine that the ranks would be: the demo model in float32.

    Raises:
        ConfigError: there is no such device, or fewer GPUs than ranks.
    """
    from omni_sp.engine.devices import rank_devices

    # Two axes at once where there are enough.
    ring = 2 if ranks >= 4 and ranks % 2 == 0 else 1
    config = DiffusionParallelConfig(ulysses_degree=ranks // ring, ring_degree=ring)
    rank_devices(device, config)
    return engine_options(SHAPES_MODEL, config, device=device, dtype="float32")


def look(smi: Smi | None, torch_cuda: TorchCuda, ranks: int, device: str) -> list[Finding]:
    """What can be seen without starting ranks.

    Args:
        smi: what nvidia-smi printed; None where it is not installed.
        torch_cuda: what torch says.
        ranks: how many there would be.
        device: theirs.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found = gpu_findings(smi, torch_cuda, os.environ)
    if smi is not None and not smi.error:
        found += topology_of(smi, cores)
    found += system.core_findings(num_cores(), ranks, on_cpu=device == "cpu")
    found += variable_findings(os.environ, ranks, network_interfaces())
    found += system.shared_memory_here()
    found += system.file_limit_here(ranks)
    found += system.ports_here()
    found += system.version_findings(system.installed_versions())
    found += system.cache_here()
    return found


def topology_of(smi: Smi, own_cores: Sequence[int]) -> list[Finding]:
    """What connects the GPUs that ranks would use, or that it cannot be read."""
    try:
        gpus = visible_gpus(parse_gpus(smi.query), os.environ)
        if not gpus:
            return []
        peer_access = parse_peer_access(smi.peer_access) if smi.peer_access else None
        return topology_findings(parse_topology(smi.topology).only(gpus), peer_access, own_cores)
    except ValueError as error:
        return [
            Finding(
                "note",
                "topology",
                f"what nvidia-smi says of it cannot be read: {error}",
                "nothing is known of what connects the GPUs; what is measured below counts",
                "please report it, with the output of nvidia-smi topo -m",
            )
        ]


def _shape(model: str | None) -> Shape:
    from omni_sp.doctor.measure import QWEN_IMAGE, Shape

    if model is None or model == QWEN_IMAGE.model:
        return QWEN_IMAGE
    from omni_sp.planner import model_cost

    cost = model_cost(model)
    return Shape(cost.name, cost.tokens, cost.heads, cost.head_dim, cost.attention_flops / cost.flops)


def _keep(report: Report) -> None:
    """Write what was measured where the planner reads it, unless it says nothing of ranks with devices of their own."""
    if report.measured is None or ":" in report.device:
        return
    try:
        report.kept = str(save_measured(report.measured))
    except OSError as error:
        report.findings.append(
            Finding(
                "warning",
                "measurements",
                f"they cannot be kept: {error}",
                "`omni-sp plan --here` knows nothing of them",
                "set OMNI_SP_CACHE to a folder that can be written to",
            )
        )
