"""What connects the GPUs of a machine, from ``nvidia-smi topo -m`` and ``nvidia-smi topo -p2p r``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from omni_sp.doctor.findings import Finding

PATHS: Mapping[str, str] = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the PCIe host bridge of a processor",
    "NODE": "several host bridges of one processor",
    "SYS": "the link between processors",
}
"""Paths without NVLink, the shortest first: what an exchange goes through."""
_ALIASES = {"SOC": "SYS"}  # as drivers before 387 call it
_PEER_STATES: Mapping[str, tuple[str, str]] = {
    "GNS": ("this kind of GPU has none", "nothing gives it to these GPUs: prefer --cfg-parallel-size and replicas"),
    "CNS": (
        "the chipset does not allow it",
        "turn off ACS and the IOMMU in the BIOS, or start Linux with iommu=pt; in a virtual machine, ask its host",
    ),
    "TNS": (
        "the GPUs are too far apart",
        "choose GPUs that lie near each other with CUDA_VISIBLE_DEVICES",
    ),
    "DR": ("the driver's settings turn it off", "remove the setting from the driver's options, and load it again"),
    "NS": (
        "the driver does not offer it",
        "on machines with NVSwitch, start nvidia-fabricmanager; else update the driver",
    ),
}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Topology:
    """What connects the GPUs of a machine.

    Attributes:
        gpus: their numbers.
        paths: (one GPU, another with a higher number) -> "NV18", "PIX", …
        cores: GPU -> the CPU cores next to it; no entry where it is not said.
    """

    gpus: tuple[int, ...]
    paths: Mapping[tuple[int, int], str]
    cores: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def path(self, one: int, other: int) -> str:
        """What connects two GPUs."""
        return self.paths[min(one, other), max(one, other)]

    def only(self, gpus: Collection[int]) -> Topology:
        """The same of some of its GPUs, in their order."""
        kept = tuple(gpu for gpu in gpus if gpu in self.gpus)
        return Topology(kept, self.paths, self.cores)

    def groups(self, is_near: Collection[str]) -> list[tuple[int, ...]]:
        """GPUs of which every two have one of these paths (NVLink where it has "NV"), each GPU in one group."""
        found: list[list[int]] = []
        for gpu in self.gpus:
            near = (group for group in found if all(_kind(self.path(gpu, other)) in is_near for other in group))
            group = next(near, None)
            if group is None:
                found.append([gpu])
            else:
                group.append(gpu)
        return [tuple(group) for group in found]


def parse_topology(text: str) -> Topology:
    """Read ``nvidia-smi topo -m``, of whatever version: NICs, affinities and the legend are there or not.

    Raises:
        ValueError: it is not such a table.
    """
    columns, rows = _table(text)
    gpus = [int(name[3:]) for name in columns if name.startswith("GPU")]
    paths, cores = {}, {}
    for name, cells in rows.items():
        if not name.startswith("GPU"):
            continue
        if len(cells) < len(columns):
            raise ValueError(f"{name} has {len(cells)} entries, and there are {len(columns)} columns")
        for column, cell in zip(columns, cells, strict=False):
            path = _ALIASES.get(cell, cell)
            if column == name or not column.startswith("GPU"):
                continue
            if _kind(path) not in ("NV", *PATHS):
                raise ValueError(f"{name} and {column} are connected by {cell!r}, which is not known")
            one, other = sorted((int(name[3:]), int(column[3:])))
            paths[one, other] = path
        rest = cells[len(columns) :]
        if rest and _CORES.fullmatch(rest[0]):
            cores[int(name[3:])] = frozenset(_numbers(rest[0]))
    missing = [pair for pair in combinations(sorted(gpus), 2) if pair not in paths]
    if missing:
        raise ValueError(f"nothing is said of GPU{missing[0][0]} and GPU{missing[0][1]}")
    return Topology(tuple(sorted(gpus)), paths, cores)


def parse_peer_access(text: str) -> dict[tuple[int, int], str]:
    """Read ``nvidia-smi topo -p2p r``: (one GPU, another) -> "OK", "CNS", …

    Raises:
        ValueError: it is not such a table.
    """
    columns, rows = _table(text)
    return {
        (int(name[3:]), int(column[3:])): cell
        for name, cells in rows.items()
        for column, cell in zip(columns, cells, strict=False)
        if column != name
    }


def _table(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the devices in the first line, and each row's cells by its name."""
    lines = [line.split() for line in _ANSI.sub("", text).splitlines()]
    header = next((words for words in lines if words and re.fullmatch(r"GPU\d+", words[0])), None)
    if header is None:
        raise ValueError("no line names the GPUs")
    columns = []
    for word in header:
        if not re.fullmatch(r"(GPU|NIC)\d+|[a-z]+\d*_\w+", word):
            break  # CPU Affinity, NUMA Affinity, GPU NUMA ID
        columns.append(word)
    after = lines[lines.index(header) + 1 :]
    rows = {words[0]: words[1:] for words in after if words and words[0] in columns}
    return columns, rows


def _kind(path: str) -> str:
    return "NV" if re.fullmatch(r"NV\d+", path) else path


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def topology_findings(
    topology: Topology, peer_access: Mapping[tuple[int, int], str] | None = None, own_cores: Collection[int] = ()
) -> list[Finding]:
    """What a topology means for ranks on these GPUs, in their order.

    Args:
        topology: of the GPUs that ranks would use.
        peer_access: what `parse_peer_access` gives; None where it is not known.
        own_cores: the CPU cores that this process may run on; empty where they are not known.
    """
    if len(topology.gpus) < 2:
        return [
            Finding(
                "ok",
                "topology",
                "one GPU",
                "one rank runs on it, and nothing is exchanged; several ranks can share it through host memory with "
                "--device cuda:0, to try degrees out, not to be faster",
            )
        ]
    found = [_links(topology)]
    found += _peer_findings(topology, peer_access or {})
    if own_cores:
        found += _core_findings(topology, frozenset(own_cores))
    return found


def _links(topology: Topology) -> Finding:
    gpus, kinds = topology.gpus, Counter(_kind(topology.path(*pair)) for pair in combinations(topology.gpus, 2))
    if set(kinds) == {"NV"}:
        names = _span(sorted({topology.path(*pair) for pair in combinations(gpus, 2)}, key=_nvlinks))
        return Finding(
            "ok",
            "topology",
            f"{len(gpus)} GPUs, NVLink between every two ({names})",
            "Ulysses and ring exchange over all of them at NVLink's speed",
        )
    if "NV" in kinds:
        return _islands(topology)
    return _without_nvlink(topology)


def _islands(topology: Topology) -> Finding:
    groups = topology.groups(["NV"])
    between = _paths_between(topology, groups)
    size = max(map(len, groups))
    order = [gpu for group in groups for gpu in group]
    degrees = f"keep --ulysses-degree at {size} at the most, and share the rest by --ring-degree or --cfg-parallel-size"
    if order != list(topology.gpus):
        degrees = f"set CUDA_VISIBLE_DEVICES={_listed(order)}, so that ranks next to each other have NVLink; {degrees}"
    return Finding(
        "warning",
        "topology",
        f"NVLink joins {_named(groups)}; between them are {_span(between)}",
        f"an all-to-all over more than {size} ranks is as fast as its slowest path, through {PATHS[between[-1]]}",
        degrees,
    )


def _without_nvlink(topology: Topology) -> Finding:
    used = sorted({topology.path(*pair) for pair in combinations(topology.gpus, 2)}, key=list(PATHS).index)
    worst = used[-1]
    remedy = (
        "ask `omni-sp plan MODEL --here`, which knows what was measured; --cfg-parallel-size 2 exchanges least, and "
        "replicas exchange nothing"
    )
    near = topology.groups([path for path in PATHS if path != worst])
    if len(used) > 1 and max(map(len, near)) > 1:
        remedy = f"nearest to each other are {_named(near)}: {_ulysses(near, topology)}; {remedy}"
    return Finding(
        "note" if worst in ("PIX", "PXB") else "warning",
        "topology",
        f"{len(topology.gpus)} GPUs without NVLink, connected by {_span(used)}",
        f"exchanges go over PCIe, through {PATHS[worst]}: they can take longer than the attention that they serve, and "
        "then many GPUs are slower than one",
        remedy,
    )


def _ulysses(groups: Sequence[tuple[int, ...]], topology: Topology) -> str:
    order = [gpu for group in groups for gpu in group]
    text = f"keep --ulysses-degree at {max(map(len, groups))} at the most"
    return text if order == list(topology.gpus) else f"set CUDA_VISIBLE_DEVICES={_listed(order)} and {text}"


def _peer_findings(topology: Topology, peer_access: Mapping[tuple[int, int], str]) -> list[Finding]:
    pairs = {
        pair: state
        for pair in combinations(sorted(topology.gpus), 2)
        if (state := peer_access.get(pair, "OK")) not in ("OK", "X", "U")
    }
    found = []
    for state in sorted(set(pairs.values())):
        own = [pair for pair, value in pairs.items() if value == state]
        total = len(topology.gpus) * (len(topology.gpus) - 1) // 2
        where = ", ".join(f"GPU{one} and GPU{other}" for one, other in own)
        if len(own) > 3:
            where = f"GPU{own[0][0]} and GPU{own[0][1]}, and {len(own) - 1} more pairs"
        if len(own) == total:
            where = "any two GPUs"
        reason, remedy = _PEER_STATES.get(state, ("nvidia-smi does not say why", "update the driver"))
        found.append(
            Finding(
                "warning",
                "peer access",
                f"no peer access between {where}: {state}, {reason}",
                "what ranks send each other goes through host memory, twice over PCIe, at half the speed or less",
                remedy,
            )
        )
    return found


def _core_findings(topology: Topology, own_cores: frozenset[int]) -> list[Finding]:
    far = [gpu for gpu in topology.gpus if gpu in topology.cores and not topology.cores[gpu] & own_cores]
    if not far:
        return []
    near = [gpu for gpu in topology.gpus if gpu not in far]
    choose = f", or take the GPUs next to these cores with CUDA_VISIBLE_DEVICES={_listed(near)}" if near else ""
    return [
        Finding(
            "warning",
            "topology",
            f"this process may not run on any CPU core next to {_named([tuple(far)])}",
            "what the host sends to these GPUs, and NCCL's own threads, cross the link between processors",
            f"start without taskset, numactl or a cpuset that leaves these cores out{choose}",
        )
    ]


def _paths_between(topology: Topology, groups: Sequence[Sequence[int]]) -> list[str]:
    paths = {
        topology.path(one, other)
        for group, another in combinations(groups, 2)
        for one in group
        for other in another
        if _kind(topology.path(one, other)) != "NV"
    }
    return sorted(paths, key=list(PATHS).index)


def _nvlinks(path: str) -> int:
    return int(path[2:])


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _listed(gpus: Sequence[int]) -> str:
    return ",".join(map(str, gpus))


def _named(groups: Sequence[Sequence[int]]) -> str:
    return " and ".join("-".join(f"GPU{gpu}" for gpu in group) for group in groups)
