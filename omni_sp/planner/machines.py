"""What devices and the links between them give, as their makers publish it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from omni_sp.errors import ConfigError
from omni_sp.planner.measured import Measured, latency_and_bandwidth, load_measured
from omni_sp.validation import suggestion

MACHINES_FILE = Path(__file__).with_name("machines.json")
HERE = "here"
"""The name of the machine that `omni-sp doctor` has measured."""
_FORWARD = 0.85
"""The part of its kernels' speed that a whole forward reaches, an assumption: norms and activations take the rest."""


@dataclass(frozen=True)
class Link:
    """What connects two devices.

    Attributes:
        gb_per_s: 10^9 bytes a second, one way.
        latency_us: microseconds that an exchange takes beyond its bytes: an assumption, where nobody publishes it.
        source: of the bandwidth.
    """

    gb_per_s: float
    latency_us: float
    source: str = ""

    def seconds(self, num_bytes: float, messages: int = 1) -> float:
        """Seconds of one exchange, or of several that follow one another."""
        return num_bytes / (self.gb_per_s * 1e9) + messages * self.latency_us * 1e-6


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, and the stack of software on them.

    Attributes:
        name: of the device.
        tflops: dense floating-point operations of bf16 and fp16, in 10^12 a second.
        fp32_tflops: the same of fp32.
        memory_gb: of one device, in 10^9 bytes.
        memory_gb_per_s: bandwidth of this memory.
        link: between the devices.
        host: between a device and the memory of its host.
        efficiency: the part of ``tflops`` that a whole forward reaches.
        link_efficiency: the part of a link's bandwidth that an exchange reaches.
        host_us: microseconds in which the host can start the kernels of one block; a block never takes less.
        exchange_us: microseconds that each exchange of a block adds for the software, beyond the link's latency.
        head_groups: the most groups into which heads are split, so that the exchange of one hides behind the attention
            of another; 1 where the software does not, or the exchange takes the same cores.
        source: of the figures.
    """

    name: str
    tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link: Link
    host: Link
    efficiency: float = 0.5
    link_efficiency: float = 0.7
    host_us: float = 800.0
    exchange_us: float = 30.0
    head_groups: int = 4
    source: str = ""


@cache
def _data() -> dict[str, dict[str, dict[str, Any]]]:
    data: dict[str, dict[str, dict[str, Any]]] = json.loads(MACHINES_FILE.read_text())
    return data


def gpu_names() -> tuple[str, ...]:
    """Names that `machine` knows."""
    return tuple(_data()["gpus"])


def link_names() -> tuple[str, ...]:
    """Names that `link` knows."""
    return tuple(_data()["links"])


def link(name: str) -> Link:
    """A link by its name, whatever its case.

    Raises:
        ConfigError: there is none of this name.
    """
    return Link(**_data()["links"][_known("link", name, link_names())])


def machine(name: str, **changes: Any) -> Machine:
    """A machine by the name of its devices, such as "h100" or "RTX 4090".

    Args:
        name: case, spaces and dashes do not matter; "here" for what ``omni-sp doctor`` measured on this machine.
        **changes: other values of `Machine`'s attributes, such as what was measured; ``link`` may be a name.

    Raises:
        ConfigError: there is no such device or link, no attribute of this name, or nothing was measured here.
    """
    known = [field.name for field in fields(Machine)]
    for change in changes:
        if change not in known:
            raise ConfigError(f"a machine has no {change}; {suggestion(change, known, f'it has {known}')}")
    found = _measured_here() if name.lower() == HERE else _published(name)
    if isinstance(changes.get("link"), str):
        changes["link"] = link(changes["link"])
    return replace(found, **changes)


def _published(name: str) -> Machine:
    known_name = _known("GPU", name, gpu_names())
    values = dict(_data()["gpus"][known_name])
    return Machine(known_name, link=link(values.pop("link")), host=link(values.pop("host")), **values)


def _measured_here() -> Machine:
    measured = load_measured()
    if measured is None:
        raise ConfigError("nothing was measured on this machine: run `omni-sp doctor` first, or name a GPU")
    return measured_machine(measured)


def num_devices_here() -> int:
    """How many devices ``omni-sp doctor`` measured on this machine; 1 where it measured none."""
    measured = load_measured()
    return 1 if measured is None else measured.num_devices


def measured_machine(measured: Measured) -> Machine:
    """The machine that was measured.

    Args:
        measured: what `load_measured` gives. Without an exchange, as of one device, the link is that to the host.
    """
    on_cpu = measured.device_type == "cpu"
    source = f"measured on {measured.host}, {measured.when}"
    host = Link(measured.host_gb_per_s, 0.0, source)
    between = host
    if measured.exchange:
        latency, bandwidth = latency_and_bandwidth(measured.exchange)
        between = Link(bandwidth / 1e9, latency * 1e6, source)
    return Machine(
        measured.device,
        tflops=measured.tflops,
        fp32_tflops=measured.tflops,
        memory_gb=measured.memory_gb,
        memory_gb_per_s=measured.memory_gb_per_s,
        link=between,
        host=host,
        efficiency=_FORWARD,
        # Estimates count two bytes an element, and CPU ranks send float32.
        link_efficiency=0.5 if on_cpu else 1.0,
        # On a CPU the host is what computes.
        host_us=0.0 if on_cpu else Machine.host_us,
        exchange_us=0.0,  # in the latency
        head_groups=1 if on_cpu else Machine.head_groups,
        source=source,
    )


def machine_of_device(device_name: str, *, memory_gb: float | None = None) -> Machine | None:
    """The machine whose name is in the name that a driver gives a device; None where it is not known.

    Args:
        device_name: such as "NVIDIA H100 80GB HBM3" or "NVIDIA GeForce RTX 4090".
        memory_gb: of the device, in 10^9 bytes; None for that of the data file.
    """
    for name in sorted(gpu_names(), key=len, reverse=True):
        words = re.sub(r"(?<=[A-Z]{3})(?=\d)", "[ -]?", name)
        if re.search(rf"(?<![a-z0-9]){words}(?![a-z0-9])", device_name, re.IGNORECASE):
            found = machine(name)
            if "pcie" in device_name.lower():
                found = replace(found, link=found.host)
            return found if memory_gb is None else replace(found, memory_gb=memory_gb)
    return None


def _known(what: str, name: str, names: tuple[str, ...]) -> str:
    def plain(text: str) -> str:
        return "".join(x for x in text.lower() if x.isalnum())

    for one in names:
        if plain(one) == plain(name):
            return one
    raise ConfigError(f"no {what} {name!r} is known; {suggestion(name, names, 'known are {known}')}")
