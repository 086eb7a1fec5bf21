"""GPUs, drivers and builds of torch that fit together, or do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from omni_sp.doctor.findings import NOTHING, Finding
from omni_sp.doctor.gpus import Smi, TorchCuda, gpu_findings, parse_gpus, visible_gpus

MIG = Path(__file__).parent.joinpath("machines", "a100-mig-list.txt").read_text()
H100 = "{}, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, Disabled, Default, 16, 16"
TWO = "\n".join(H100.format(index) for index in range(2))
BUILT = ("sm_80", "sm_86", "sm_90")
FITS = TorchCuda("2.13.0+cu128", "12.8", 2, ((9, 0), (9, 0)), BUILT)
NONE = TorchCuda("2.13.0+cu128", "12.8", error="no CUDA-capable device is detected")


def found(smi: Smi | None, torch_cuda: TorchCuda, environ: Mapping[str, str] | None = None) -> list[Finding]:
    return gpu_findings(smi, torch_cuda, environ or {})


def test_a_machine_that_is_set_up() -> None:
    assert found(Smi(TWO), FITS) == [
        Finding(
            "ok",
            "GPUs",
            "2 x NVIDIA H100 80GB HBM3",
            "as many ranks can have a GPU of their own: torch 2.13.0+cu128 is built for CUDA 12.8",
            NOTHING,
        ),
        Finding("ok", "driver", "driver 570.124.06", "it is new enough for torch's CUDA 12.8", NOTHING),
    ]


def test_a_machine_without_gpus() -> None:
    (one,) = found(None, TorchCuda("2.13.0+cpu", None))
    assert (one.level, one.what) == ("ok", "no GPU")


@pytest.mark.parametrize(
    ("smi", "torch_cuda", "environ", "level", "what", "remedy"),
    [
        (
            Smi(error="Failed to initialize NVML: Driver/library version mismatch"),
            NONE,
            {},
            "error",
            "nvidia-smi gives no answer: Failed to initialize NVML: Driver/library version mismatch",
            "load the driver (after an update of it: restart the machine), or give the container its GPUs (--gpus all)",
        ),
        (
            Smi(TWO),
            TorchCuda("2.13.0+cpu", None),
            {},
            "error",
            "2 x NVIDIA H100 80GB HBM3, and torch 2.13.0+cpu is a build without CUDA",
            "install a build of torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu128 "
            "(or a newer one that the driver can run)",
        ),
        (
            Smi(TWO),
            NONE,
            {"CUDA_VISIBLE_DEVICES": ""},
            "error",
            "CUDA_VISIBLE_DEVICES='' hides all 2 GPUs",
            "unset CUDA_VISIBLE_DEVICES, or name GPUs of this machine in it; --device cpu if that is meant",
        ),
        (
            Smi(TWO),
            NONE,
            {},
            "error",
            "torch 2.13.0+cu128 for CUDA 12.8 can use none of 2 GPUs: no CUDA-capable device is detected",
            "update the driver, or install a build of torch for an older CUDA; on machines with NVSwitch, start "
            "nvidia-fabricmanager",
        ),
        (
            Smi(TWO.replace("570.124.06", "470.57.02")),
            FITS,
            {},
            "error",
            "driver 470.57.02 is too old for torch's CUDA 12.8, which needs 525.60.13",
            "update the driver, or install a build of torch for an older CUDA",
        ),
        (
            Smi(TWO),
            TorchCuda("2.13.0+cu126", "12.6", 2, ((12, 0), (12, 0)), BUILT),
            {},
            "error",
            "torch 2.13.0+cu126 has no kernels for sm_120 (it has sm_80, sm_86, sm_90)",
            "install a build of torch for a newer CUDA, or an older torch for an older GPU",
        ),
        (
            Smi(f"{H100.format(0)}\n1, NVIDIA A100-SXM4-80GB, 570.124.06, 81920, 4, Disabled, Default, 16, 16"),
            TorchCuda("2.13.0+cu128", "12.8", 2, ((9, 0), (8, 0)), BUILT),
            {},
            "warning",
            "GPUs of several kinds: NVIDIA A100-SXM4-80GB and NVIDIA H100 80GB HBM3",
            "choose GPUs of one kind with CUDA_VISIBLE_DEVICES, and set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that they "
            "have nvidia-smi's numbers",
        ),
        (
            Smi("0, NVIDIA A100-SXM4-80GB, 570.124.06, 81920, 4, Enabled, Default, 16, 16", MIG),
            TorchCuda("2.13.0+cu128", "12.8", 1, ((8, 0),), BUILT),
            {},
            "warning",
            "MIG partitions GPU0 into 2 instances",
            "for one rank set CUDA_VISIBLE_DEVICES to an instance's UUID (nvidia-smi -L); for several, turn MIG off as "
            "root with nvidia-smi -mig 0",
        ),
        (
            Smi(TWO.replace(" 4, Disabled, Default, 16,", " 20480, Disabled, Default, 4,", 1)),
            FITS,
            {},
            "warning",
            "20.0 of 80 GiB of GPU0 are in use",
            "end the other program (nvidia-smi lists it), or leave this GPU out with CUDA_VISIBLE_DEVICES",
        ),
        (
            Smi(TWO.replace("Default, 16,", "Default, 4,", 1)),
            FITS,
            {},
            "warning",
            "GPU0 has 4 of 16 PCIe lanes",
            "put the GPU into a slot with all lanes, and look at risers and the BIOS",
        ),
        (
            Smi(TWO.replace("Default", "Prohibited", 1)),
            FITS,
            {},
            "error",
            "GPU0 is in compute mode Prohibited",
            "set it back as root: nvidia-smi -i 0 -c DEFAULT",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found(
    smi: Smi, torch_cuda: TorchCuda, environ: dict[str, str], level: str, what: str, remedy: str
) -> None:
    every = found(smi, torch_cuda, environ)
    (one,) = [finding for finding in every if finding.what == what]
    assert (one.level, one.remedy) == (level, remedy)
    assert one.meaning


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("", []), ("-1", []), ("1,9,2", [1]), ("GPU-5a7d", [0, 1, 2, 3])],
)
def test_visible_gpus(value: str | None, expected: list[int]) -> None:
    gpus = parse_gpus("\n".join(H100.format(index) for index in range(4)))
    assert visible_gpus(gpus, {} if value is None else {"CUDA_VISIBLE_DEVICES": value}) == expected


def test_a_kernel_for_an_earlier_minor_version_serves() -> None:
    ada = TorchCuda("2.13.0+cu128", "12.8", 1, ((8, 9),), BUILT)
    assert not [one for one in found(Smi(H100.format(0)), ada) if one.level == "error"]
