"""Recorded machines give the expected findings, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_sp.doctor.examine import topology_of
from omni_sp.doctor.findings import NOTHING, Finding
from omni_sp.doctor.gpus import Smi
from omni_sp.doctor.topology import parse_peer_access, parse_topology, topology_findings

MACHINES = Path(__file__).with_name("machines")
PCIE = "they can take longer than the attention that they serve, and then many GPUs are slower than one"
ASK = (
    "ask `omni-sp plan MODEL --here`, which knows what was measured; --cfg-parallel-size 2 exchanges least, and "
    "replicas exchange nothing"
)
TWICE = "what ranks send each other goes through host memory, twice over PCIe, at half the speed or less"
ONE_GPU = Finding(
    "ok",
    "topology",
    "one GPU",
    "one rank runs on it, and nothing is exchanged; several ranks can share it through host memory with --device "
    "cuda:0, to try degrees out, not to be faster",
    NOTHING,
)


def links(level: str, what: str, meaning: str, remedy: str = NOTHING) -> Finding:
    return Finding(level, "topology", what, meaning, remedy)  # type: ignore[arg-type]


EXPECTED: dict[str, list[Finding]] = {
    "hgx-h100": [
        links(
            "ok",
            "8 GPUs, NVLink between every two (NV18)",
            "Ulysses and ring exchange over all of them at NVLink's speed",
        )
    ],
    "a100-pcie-bridged-neighbours": [
        links(
            "warning",
            "NVLink joins GPU0-GPU1 and GPU2-GPU3; between them are SYS",
            "an all-to-all over more than 2 ranks is as fast as its slowest path, through the link between processors",
            "keep --ulysses-degree at 2 at the most, and share the rest by --ring-degree or --cfg-parallel-size",
        )
    ],
    "h100-nvl-bridged-pairs": [
        links(
            "warning",
            "NVLink joins GPU0-GPU2 and GPU1-GPU3; between them are SYS",
            "an all-to-all over more than 2 ranks is as fast as its slowest path, through the link between processors",
            "set CUDA_VISIBLE_DEVICES=0,2,1,3, so that ranks next to each other have NVLink; keep --ulysses-degree at "
            "2 at the most, and share the rest by --ring-degree or --cfg-parallel-size",
        )
    ],
    "dgx1-v100": [
        links(
            "warning",
            "NVLink joins GPU0-GPU1-GPU2-GPU3 and GPU4-GPU5-GPU6-GPU7; between them are SYS",
            "an all-to-all over more than 4 ranks is as fast as its slowest path, through the link between processors",
            "keep --ulysses-degree at 4 at the most, and share the rest by --ring-degree or --cfg-parallel-size",
        )
    ],
    "l40s-8": [
        links(
            "warning",
            "8 GPUs without NVLink, connected by PIX to SYS",
            f"exchanges go over PCIe, through the link between processors: {PCIE}",
            "nearest to each other are GPU0-GPU1-GPU2-GPU3 and GPU4-GPU5-GPU6-GPU7: keep --ulysses-degree at 4 at the "
            f"most; {ASK}",
        ),
        Finding(
            "warning",
            "peer access",
            "no peer access between GPU0 and GPU4, and 15 more pairs: TNS, the GPUs are too far apart",
            TWICE,
            "choose GPUs that lie near each other with CUDA_VISIBLE_DEVICES",
        ),
    ],
    "l20-4-pcie-switches": [
        links(
            "note",
            "4 GPUs without NVLink, connected by PIX to PXB",
            f"exchanges go over PCIe, through several PCIe switches: {PCIE}",
            f"nearest to each other are GPU0-GPU1 and GPU2-GPU3: keep --ulysses-degree at 2 at the most; {ASK}",
        )
    ],
    "rtx5090-2": [
        links(
            "warning",
            "2 GPUs without NVLink, connected by PHB",
            f"exchanges go over PCIe, through the PCIe host bridge of a processor: {PCIE}",
            ASK,
        ),
        Finding(
            "warning",
            "peer access",
            "no peer access between any two GPUs: GNS, this kind of GPU has none",
            TWICE,
            "nothing gives it to these GPUs: prefer --cfg-parallel-size and replicas",
        ),
    ],
    "rtx4090-4-virtual-machine": [
        links(
            "warning",
            "4 GPUs without NVLink, connected by PHB",
            f"exchanges go over PCIe, through the PCIe host bridge of a processor: {PCIE}",
            ASK,
        ),
        Finding(
            "warning",
            "peer access",
            "no peer access between any two GPUs: CNS, the chipset does not allow it",
            TWICE,
            "turn off ACS and the IOMMU in the BIOS, or start Linux with iommu=pt; in a virtual machine, ask its host",
        ),
    ],
    "a6000-2-node": [
        links(
            "warning",
            "2 GPUs without NVLink, connected by NODE",
            f"exchanges go over PCIe, through several host bridges of one processor: {PCIE}",
            ASK,
        )
    ],
    "p100-4-soc": [
        links(
            "warning",
            "4 GPUs without NVLink, connected by PHB to SYS",
            f"exchanges go over PCIe, through the link between processors: {PCIE}",
            f"nearest to each other are GPU0-GPU1 and GPU2-GPU3: keep --ulysses-degree at 2 at the most; {ASK}",
        )
    ],
    "h200-1": [ONE_GPU],
    "a100-mig": [ONE_GPU],
}


def recorded(name: str) -> str:
    return (MACHINES / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recorded_machine(name: str) -> None:
    peer_access = parse_peer_access(recorded(f"{name}-p2p")) if (MACHINES / f"{name}-p2p.txt").exists() else None
    assert topology_findings(parse_topology(recorded(name)), peer_access) == EXPECTED[name]


def test_every_recorded_machine_is_looked_at() -> None:
    names = {path.stem for path in MACHINES.glob("*.txt") if not path.stem.endswith(("-p2p", "-list"))}
    assert names == set(EXPECTED)


def test_gpus_that_a_program_does_not_see_do_not_count() -> None:
    pairs = parse_topology(recorded("h100-nvl-bridged-pairs"))
    (found,) = topology_findings(pairs.only([0, 2]))
    assert found.what == "2 GPUs, NVLink between every two (NV12)"
    (found,) = topology_findings(pairs.only([0, 2, 1, 3]))
    assert not found.remedy.startswith("set CUDA_VISIBLE_DEVICES"), "they stand as they should"
    assert topology_findings(pairs.only([1])) == [ONE_GPU]


def test_a_process_that_may_not_run_next_to_its_gpus() -> None:
    _, found = topology_findings(parse_topology(recorded("hgx-h100")), None, range(8))
    assert found == Finding(
        "warning",
        "topology",
        "this process may not run on any CPU core next to GPU4-GPU5-GPU6-GPU7",
        "what the host sends to these GPUs, and NCCL's own threads, cross the link between processors",
        "start without taskset, numactl or a cpuset that leaves these cores out, or take the GPUs next to these cores "
        "with CUDA_VISIBLE_DEVICES=0,1,2,3",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line names the GPUs"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18", "GPU1 has 1 entries, and there are 2 columns"),
        ("\tGPU0\tGPU1\nGPU0\t X \tZZZ\nGPU1\tZZZ\t X ", "GPU0 and GPU1 are connected by 'ZZZ', which is not known"),
        ("\tGPU0\tGPU1\n", "nothing is said of GPU0 and GPU1"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=message):
        parse_topology(text)
    query = (
        "0, NVIDIA L4, 570.1, 23034, 1, [N/A], Default, 16, 16\n1, NVIDIA L4, 570.1, 23034, 1, [N/A], Default, 16, 16"
    )
    (found,) = topology_of(Smi(query, topology=text), ())
    assert found.level == "note"
    assert message in found.what
