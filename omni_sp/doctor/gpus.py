"""The GPUs of a machine as its driver and torch see them, and whether these fit together."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omni_sp.doctor.findings import Finding

QUERY = (
    "index", "name", "driver_version", "memory.total", "memory.used", "mig.mode.current", "compute_mode",
    "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip
"""What ``nvidia-smi --query-gpu`` is asked for."""
_NVIDIA_SMI_S = 30.0
# The driver that a CUDA version needs at the least, on Linux: NVIDIA's table of minor version compatibility.
_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
_USED_MB = 1000


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi describes it; memory in MiB.

    Attributes:
        index: its number for nvidia-smi.
        name: of its kind.
        driver: the driver's version.
        memory: of the device.
        used: how much of it is in use.
        is_mig: whether it is partitioned.
        compute_mode: "Default", "Exclusive_Process" or "Prohibited".
        width: PCIe lanes now.
        max_width: PCIe lanes that it has.
    """

    index: int
    name: str
    driver: str
    memory: int
    used: int
    is_mig: bool = False
    compute_mode: str = "Default"
    width: int = 0
    max_width: int = 0


@dataclass(frozen=True)
class TorchCuda:
    """What torch says of CUDA here.

    Attributes:
        version: torch's own.
        cuda: the CUDA version that it was built for; None for a build without, as those for ROCm are.
        num_devices: GPUs that it can use.
        capabilities: compute capability of each.
        architectures: what it has kernels for, such as "sm_90".
        error: what it says where it can use none.
    """

    version: str
    cuda: str | None
    num_devices: int = 0
    capabilities: tuple[tuple[int, int], ...] = ()
    architectures: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi printed, by command; empty where there is none.

    Attributes:
        query: ``--query-gpu=…``
        devices: ``-L``
        topology: ``topo -m``
        peer_access: ``topo -p2p r``
        error: why it printed nothing.
    """

    query: str = ""
    devices: str = ""
    topology: str = ""
    peer_access: str = ""
    error: str = field(default="", compare=False)


def ask_nvidia_smi() -> Smi | None:
    """What nvidia-smi prints here, each within 30 seconds; None where it is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    errors = []

    def ask(*words: str) -> str:
        try:
            done = subprocess.run([program, *words], capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            errors.append(f"nvidia-smi {' '.join(words)}: {error}")
            return ""
        if done.returncode:
            errors.append(" ".join((done.stdout or done.stderr).split())[:300])
        return done.stdout if done.returncode == 0 else ""

    query = ask(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
    if errors:  # the driver does not answer: it would not answer the rest either
        return Smi(error=errors[0])
    return Smi(query, ask("-L"), ask("topo", "-m"), ask("topo", "-p2p", "r"))


def ask_torch() -> TorchCuda:
    """What torch can use here."""
    import torch

    version, cuda = str(torch.__version__), torch.version.cuda
    if not torch.cuda.is_available():
        error = ""
        if cuda is not None:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as found:
                error = " ".join(str(found).split())
        return TorchCuda(version, cuda, error=error)
    count = torch.cuda.device_count()
    capabilities = tuple(torch.cuda.get_device_capability(index) for index in range(count))
    return TorchCuda(version, cuda, count, capabilities, tuple(torch.cuda.get_arch_list()))


def parse_gpus(query: str) -> list[Gpu]:
    """Read ``nvidia-smi --query-gpu=… --format=csv,noheader,nounits``.

    Raises:
        ValueError: it is not such a table.
    """
    found = []
    for line in filter(None, map(str.strip, query.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(QUERY):
            raise ValueError(f"{line!r} has {len(values)} values, and {len(QUERY)} were asked for")
        of = dict(zip(QUERY, values, strict=True))
        found.append(
            Gpu(
                int(of["index"]),
                of["name"],
                of["driver_version"],
                _number(of["memory.total"]),
                _number(of["memory.used"]),
                of["mig.mode.current"] == "Enabled",
                of["compute_mode"],
                _number(of["pcie.link.width.current"]),
                _number(of["pcie.link.width.max"]),
            )
        )
    return found


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[int]:
    """The numbers of those that CUDA_VISIBLE_DEVICES leaves, in its order; all where it names them otherwise."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    known = [gpu.index for gpu in gpus]
    if named is None:
        return known
    found: list[int] = []
    for word in map(str.strip, named.split(",")):
        if not re.fullmatch(r"-?\d+", word):
            return known if word else found
        if int(word) not in known:
            break  # CUDA ignores what follows
        found.append(int(word))
    return found


def gpu_findings(smi: Smi | None, torch_cuda: TorchCuda, environ: Mapping[str, str]) -> list[Finding]:
    """Whether there are GPUs, and whether driver, torch and environment let ranks use them.

    Args:
        smi: what nvidia-smi printed; None where it is not installed.
        torch_cuda: what torch says.
        environ: the environment.
    """
    if smi is None and torch_cuda.num_devices == 0:
        return [Finding("ok", "GPUs", "no GPU", "ranks run on the CPU, as exactly as on GPUs, and slowly")]
    if smi is not None and smi.error:
        return [_no_driver(smi.error)]
    gpus = parse_gpus(smi.query) if smi is not None else []
    visible = [gpu for index in visible_gpus(gpus, environ) for gpu in gpus if gpu.index == index]
    found = _usable(gpus, visible, torch_cuda, environ)
    if gpus:
        found += _driver(gpus[0].driver, torch_cuda)
    found += _kernels_for(torch_cuda)
    found += _mig([gpu for gpu in visible or gpus if gpu.is_mig], smi.devices if smi is not None else "")
    return found + _states(visible)


def _no_driver(error: str) -> Finding:
    return Finding(
        "error",
        "driver",
        f"nvidia-smi gives no answer: {error}",
        "no program can use the GPUs",
        "load the driver (after an update of it: restart the machine), or give the container its GPUs (--gpus all)",
    )


def _usable(
    gpus: Sequence[Gpu], visible: Sequence[Gpu], torch_cuda: TorchCuda, environ: Mapping[str, str]
) -> list[Finding]:
    if torch_cuda.num_devices:
        kinds = sorted({gpu.name for gpu in visible})
        name = " and ".join(kinds) or "GPUs"
        found = [
            Finding(
                "ok",
                "GPUs",
                f"{torch_cuda.num_devices} x {name}",
                f"as many ranks can have a GPU of their own: torch {torch_cuda.version} is built for "
                f"{'CUDA ' + torch_cuda.cuda if torch_cuda.cuda else 'ROCm'}",
            )
        ]
        if len(kinds) > 1:
            found.append(
                Finding(
                    "warning",
                    "GPUs",
                    f"GPUs of several kinds: {name}",
                    "all ranks do the same work, so that the slowest GPU sets the pace, and the smallest memory is the "
                    "limit",
                    "choose GPUs of one kind with CUDA_VISIBLE_DEVICES, and set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that "
                    "they have nvidia-smi's numbers",
                )
            )
        return found
    if torch_cuda.cuda is None:
        return [
            Finding(
                "error",
                "torch",
                f"{len(gpus)} x {gpus[0].name}, and torch {torch_cuda.version} is a build without CUDA",
                "ranks would run on the CPU",
                "install a build of torch for CUDA: pip install torch --index-url "
                "https://download.pytorch.org/whl/cu128 (or a newer one that the driver can run)",
            )
        ]
    if gpus and not visible:
        value = environ.get("CUDA_VISIBLE_DEVICES", "")
        return [
            Finding(
                "error",
                "GPUs",
                f"CUDA_VISIBLE_DEVICES={value!r} hides all {len(gpus)} GPUs",
                "ranks would run on the CPU",
                "unset CUDA_VISIBLE_DEVICES, or name GPUs of this machine in it; --device cpu if that is meant",
            )
        ]
    return [
        Finding(
            "error",
            "torch",
            f"torch {torch_cuda.version} for CUDA {torch_cuda.cuda} can use none of {len(gpus)} GPUs: "
            f"{torch_cuda.error or 'it does not say why'}",
            "ranks would run on the CPU",
            "update the driver, or install a build of torch for an older CUDA; on machines with NVSwitch, start "
            "nvidia-fabricmanager",
        )
    ]


def _driver(driver: str, torch_cuda: TorchCuda) -> list[Finding]:
    if torch_cuda.cuda is None:
        return []
    needed = _DRIVERS.get(int(torch_cuda.cuda.split(".")[0]))
    if needed is None or _version(driver) >= needed:
        return [Finding("ok", "driver", f"driver {driver}", f"it is new enough for torch's CUDA {torch_cuda.cuda}")]
    least = ".".join(f"{part:02d}" if place else str(part) for place, part in enumerate(needed))
    return [
        Finding(
            "error",
            "driver",
            f"driver {driver} is too old for torch's CUDA {torch_cuda.cuda}, which needs {least}",
            "torch cannot use the GPUs, or fails at the first kernel",
            "update the driver, or install a build of torch for an older CUDA",
        )
    ]


def _kernels_for(torch_cuda: TorchCuda) -> list[Finding]:
    """GPUs that this build of torch has no kernels for: of their own, or of an earlier minor version."""
    built = {_version(name[3:]) for name in torch_cuda.architectures if re.fullmatch(r"sm_\d+a?", name)}
    able = {(number[0] // 10, number[0] % 10) for number in built if number}
    has_ptx = any(name.startswith("compute_") for name in torch_cuda.architectures)
    lacking = {one for one in torch_cuda.capabilities if not any(own[0] == one[0] and own <= one for own in able)}
    if not able or not lacking or has_ptx:
        return []
    names = ", ".join(f"sm_{major}{minor}" for major, minor in sorted(lacking))
    return [
        Finding(
            "error",
            "torch",
            f"torch {torch_cuda.version} has no kernels for {names} (it has {', '.join(torch_cuda.architectures)})",
            "it fails at the first kernel with 'no kernel image is available'",
            "install a build of torch for a newer CUDA, or an older torch for an older GPU",
        )
    ]


def _mig(gpus: Sequence[Gpu], devices: str) -> list[Finding]:
    if not gpus:
        return []
    slices = len(re.findall(r"^\s+MIG ", devices, re.MULTILINE))
    names = ", ".join(f"GPU{gpu.index}" for gpu in gpus)
    return [
        Finding(
            "warning",
            "MIG",
            f"MIG partitions {names} into {slices} instances",
            "a process uses one instance, and ranks on several instances have neither peer access nor NCCL: one rank",
            "for one rank set CUDA_VISIBLE_DEVICES to an instance's UUID (nvidia-smi -L); for several, turn MIG off as "
            "root with nvidia-smi -mig 0",
        )
    ]


def _states(gpus: Sequence[Gpu]) -> list[Finding]:
    """What is not as usual about single GPUs."""
    found = []
    for gpu in gpus:
        name = f"GPU{gpu.index}"
        if gpu.compute_mode == "Prohibited":
            found.append(
                Finding(
                    "error",
                    "GPUs",
                    f"{name} is in compute mode Prohibited",
                    "no program can compute on it",
                    f"set it back as root: nvidia-smi -i {gpu.index} -c DEFAULT",
                )
            )
        if gpu.used > _USED_MB:
            found.append(
                Finding(
                    "warning",
                    "memory",
                    f"{gpu.used / 1024:.1f} of {gpu.memory / 1024:.0f} GiB of {name} are in use",
                    "a model may not fit beside it, and the other program's work slows all ranks down",
                    "end the other program (nvidia-smi lists it), or leave this GPU out with CUDA_VISIBLE_DEVICES",
                )
            )
        if 0 < gpu.width < gpu.max_width:
            found.append(
                Finding(
                    "warning",
                    "PCIe",
                    f"{name} has {gpu.width} of {gpu.max_width} PCIe lanes",
                    "what goes over PCIe takes that much longer: weights, and exchanges without NVLink",
                    "put the GPU into a slot with all lanes, and look at risers and the BIOS",
                )
            )
    return found


def _number(text: str) -> int:
    """A number, or 0 for "[N/A]"."""
    return int(float(text)) if re.fullmatch(r"\d+(\.\d+)?", text) else 0


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
