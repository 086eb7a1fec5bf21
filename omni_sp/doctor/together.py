"""What ranks of this machine do together for the doctor, and what their answers mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from platform import node

import torch

from omni_sp.attention.kernels import exact_kernels, load_kernel
from omni_sp.doctor import measure, rank_proof
from omni_sp.doctor.findings import Finding
from omni_sp.doctor.kernel_proof import KernelError
from omni_sp.doctor.measure import Shape, Speed, Transfers
from omni_sp.doctor.rank_proof import AMPLIFIED, EXACT, SequenceError, StepResult
from omni_sp.doctor.ranks import DoctorRanks
from omni_sp.doctor.system import package_findings
from omni_sp.engine.messages import EngineOptions
from omni_sp.errors import ConfigError, OmniSPError
from omni_sp.planner.machines import machine
from omni_sp.planner.measured import KernelSpeed, Measured, Transfer, latency_and_bandwidth

OnStep = Callable[[str, int], None]
_UNEVEN = 1.3
"""So many times as fast as the slowest rank's device, and devices are not alike."""
_SLOW_KERNEL = 1.2
_SLOW_LINK = 0.25
"""A smaller part of the bandwidth that its maker publishes, and a link is slow."""
_REPORT = "please report it, with this output (--json)"


def examine_ranks(
    options: EngineOptions, shape: Shape, timeout_s: float, on_step: OnStep
) -> tuple[list[Finding], Measured | None]:
    """Start the ranks, let them measure and prove, and end them.

    A step that fails ends the examination: what the ranks wait for then is not known.

    Args:
        options: the degrees and devices.
        shape: at which kernels are timed.
        timeout_s: the longest that each step may take, in seconds.
        on_step: called with what is done next, and how many steps are over.

    Returns:
        The findings, and what was measured; None where that failed.
    """
    size = options.config.world_size
    found = package_findings({name: load_kernel(name).modules for name in exact_kernels()})
    measured: Measured | None = None
    step = "start of the ranks"
    try:
        on_step(f"starting {size} {_ranks(size)}", 1)
        with DoctorRanks(options, timeout_s) as ranks:
            found.append(Finding("ok", "ranks", f"{size} {_ranks(size)} started and joined", "so do those of Omni"))
            step, transfers = "exchanges", None
            if size > 1:
                on_step("timing exchanges", 2)
                transfers = ranks.run(measure.transfers)
            step = "speed of kernels"
            on_step(f"timing kernels at the shapes of {shape.model}", 3)
            speeds: list[Speed] = ranks.run(measure.speed, shape)
            measured = as_measured(options, shape, transfers, speeds)
            found += [*transfer_findings(measured), *speed_findings(speeds, shape)]
            step = "proof of the kernels"
            on_step("comparing kernels with float64", 4)
            found += kernel_findings(ranks.run(rank_proof.kernels))
            step = "proof of attention over ranks"
            on_step("comparing attention over all ranks with float64", 5)
            found += sequence_findings(ranks.run(rank_proof.sequences))
            step = "proof by the demo model"
            on_step("drawing with the demo model", 6)
            found += step_findings(ranks.run(rank_proof.demo_step))
    except OmniSPError as error:
        found.append(_failed(step, error))
    return found, measured


def _failed(step: str, error: OmniSPError) -> Finding:
    return Finding(
        "error",
        step,
        " ".join(str(error).split()),
        "ranks of a model can fail in the same way; what comes after this step was not done",
        "see the findings on environment, limits, shared memory and drivers; on GPUs, NCCL_DEBUG=WARN says more; a "
        "slow machine needs a larger --timeout",
    )


def as_measured(
    options: EngineOptions, shape: Shape, transfers: Sequence[Transfers] | None, speeds: Sequence[Speed]
) -> Measured:
    """What all ranks have measured: of each number, the slowest rank's."""
    first, slowest = speeds[0], min(speeds, key=lambda one: one.linear_tflops)
    names = [name for name in first.kernels if all(name in one.kernels for one in speeds)]
    kernels = [
        KernelSpeed(name, first.dtype, *max((one.kernels[name] for one in speeds), key=lambda taken: taken[0]))
        for name in names
    ]
    together = {
        kind: tuple(
            Transfer(sizes[0][0], max(seconds for _, seconds in sizes))
            for sizes in zip(*(getattr(one, kind) for one in transfers or ()), strict=True)
        )
        for kind in ("exchange", "ring")
    }
    return Measured(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        host=node(),
        device_type="cpu" if options.device == "cpu" else "cuda",
        device=first.device,
        num_devices=len(speeds),
        torch=str(torch.__version__),
        transport=transfers[0].transport if transfers else "none",
        model=shape.model,
        shape=f"{first.tokens} of {shape.tokens} tokens, {first.heads} of {shape.heads} heads of {shape.head_dim}",
        attention_share=shape.attention_share,
        dtype=first.dtype,
        kernels=tuple(sorted(kernels, key=lambda one: one.seconds)),
        linear_tflops=slowest.linear_tflops,
        exchange=together["exchange"],
        ring=together["ring"],
        memory_gb=min(one.memory_gb for one in speeds),
        memory_gb_per_s=min(one.memory_gb_per_s for one in speeds),
        host_gb_per_s=min(one.host_gb_per_s for one in speeds),
    )


def transfer_findings(measured: Measured) -> list[Finding]:
    """Whether exchanges are as fast as what they go through."""
    if not measured.exchange:
        return []
    latency, bandwidth = latency_and_bandwidth(measured.exchange)
    _, ring = latency_and_bandwidth(measured.ring)
    what = (
        f"{measured.transport}: an all-to-all over {measured.num_devices} ranks takes {latency * 1e6:.0f} us and "
        f"{bandwidth / 1e9:.2f} GB/s, a ring shift {ring / 1e9:.2f} GB/s"
    )
    if measured.transport == "gloo" and measured.device_type == "cpu":
        return [
            Finding(
                "note",
                "exchanges",
                what,
                "the ranks cannot read each other's memory, so that tensors cross by sockets, which is slower",
                "unset OMNI_SP_SHARED_MEMORY; in containers, allow memfd_create and reading /proc/PID/fd of a process "
                "of the same user",
            )
        ]
    published = _published_link(measured)
    if published is not None and bandwidth / 1e9 < _SLOW_LINK * published:
        return [
            Finding(
                "warning",
                "exchanges",
                f"{what}; {published:g} GB/s are published for {measured.device}",
                "Ulysses and ring cost more than they should, and may not pay",
                "see the findings on topology, peer access and NCCL_*; GPUs of one kind without NVLink are this slow",
            )
        ]
    return [Finding("ok", "exchanges", what, "`omni-sp plan MODEL --here` reckons with it")]


def _published_link(measured: Measured) -> float | None:
    """GB/s of the link that the maker publishes; None for CPUs, and for GPUs that the planner does not know."""
    if measured.device_type == "cpu" or measured.transport != "nccl":
        return None
    for word in measured.device.replace("-", " ").split():
        try:
            return machine(word).link.gb_per_s
        except ConfigError:
            continue
    return None


def speed_findings(speeds: Sequence[Speed], shape: Shape) -> list[Finding]:
    """Which kernel is fastest, whether "auto" takes it, and whether all devices are alike."""
    first, found = speeds[0], []
    fastest, (seconds, tflops) = min(first.kernels.items(), key=lambda item: item[1][0])
    timed = ", ".join(f"{name} {taken[0] * 1e3:.2f} ms" for name, taken in first.kernels.items())
    what = f"attention of {shape.model} in {first.dtype}, {first.tokens} tokens x {first.heads} heads: {timed}"
    chosen = first.kernels.get(first.auto, (seconds, tflops))[0]
    if chosen > _SLOW_KERNEL * seconds:
        found.append(
            Finding(
                "note",
                "kernels",
                what,
                f"'auto' takes {first.auto}, and {fastest} takes {seconds / chosen:.0%} of its time here",
                "draw with --attention-backend tune, which times them at the shapes that are really used",
            )
        )
    else:
        meaning = f"'auto' takes {first.auto}; {tflops:.3g} TFLOPS, linear layers {first.linear_tflops:.3g}"
        found.append(Finding("ok", "kernels", what, meaning))
    by_rank = [one.linear_tflops for one in speeds]
    if max(by_rank) > _UNEVEN * min(by_rank) and first.dtype != "float32":
        slow = by_rank.index(min(by_rank))
        found.append(
            Finding(
                "warning",
                "kernels",
                f"rank {slow}'s GPU computes {min(by_rank):.3g} TFLOPS, the fastest {max(by_rank):.3g}",
                "all ranks wait for the slowest one",
                "look with nvidia-smi for heat, a power limit or another program on that GPU, or leave it out with "
                "CUDA_VISIBLE_DEVICES",
            )
        )
    return found


def kernel_findings(answers: Sequence[tuple[list[str], list[KernelError]]]) -> list[Finding]:
    """Whether every kernel equals float64 on every rank's device.

    Args:
        answers: of each rank, see `omni_sp.doctor.rank_proof.kernels`.
    """
    tried = answers[0][0]
    wrong: dict[tuple[str, str], list[tuple[int, KernelError]]] = {}
    for rank, (_, errors) in enumerate(answers):
        for error in errors:
            wrong.setdefault((error.kernel, error.dtype), []).append((rank, error))
    found = []
    for (kernel, dtype), cases in wrong.items():
        on = sorted({rank for rank, _ in cases})
        where = "all ranks" if len(on) == len(answers) > 1 else f"rank {', '.join(map(str, on))}"
        one = cases[0][1]
        if all(error.raises for _, error in cases):
            found.append(_not_running(kernel, dtype, where, one))
            continue
        others = len({error.case for _, error in cases}) - 1
        more = f" (and {others} more cases)" if others else ""
        found.append(
            Finding(
                "error",
                "kernels",
                f"the attention kernel {kernel} is wrong in {dtype} on {where}: {one.case}: {one.text}{more}",
                "pictures that it draws are wrong, perhaps without looking so",
                _instead(kernel, len(on) < len(answers)),
            )
        )
    good = [name for name in tried if tuple(name.split()) not in wrong]
    if good:
        meaning = "what they compute on these devices is exact but for rounding"
        found.append(Finding("ok", "kernels", f"equal to float64: {', '.join(good)}", meaning))
    return found


def _not_running(kernel: str, dtype: str, where: str, one: KernelError) -> Finding:
    return Finding(
        "warning",
        "kernels",
        f"the attention kernel {kernel} does not run in {dtype} on {where}: {one.case}: {one.text}",
        "where it is named, or where 'auto' takes it, attention fails with this error; it gives no wrong numbers",
        "name another one with --attention-backend, or install a build for this GPU and this torch",
    )


def _instead(kernel: str, is_one_device: bool) -> str:
    if is_one_device:
        return "the other ranks compute it right: leave that GPU out with CUDA_VISIBLE_DEVICES, and have it tested"
    return f"draw with --attention-backend and another kernel than {kernel}, install another build of it, and report it"


def sequence_findings(answers: Sequence[Sequence[SequenceError]]) -> list[Finding]:
    """Whether attention over all ranks equals float64, and gives the same bits each time.

    Args:
        answers: of each rank, see `omni_sp.doctor.rank_proof.sequences`.
    """
    every = [(rank, one) for rank, errors in enumerate(answers) for one in errors]
    wrong = [(rank, one) for rank, one in every if not one.error <= one.allowed]
    restless = [(rank, one) for rank, one in every if not one.repeats]
    layouts = list(Counter(one.layout for _, one in every))
    found = []
    if wrong:
        rank, one = max(wrong, key=lambda item: item[1].error / item[1].allowed)
        found.append(
            Finding(
                "error",
                "attention over ranks",
                f"{one.layout}, {one.problem}: rank {rank} is off by {one.error:.1e}, allowed are {one.allowed:.1e} "
                f"({len(wrong)} of {len(every)} results are wrong)",
                "pictures over several ranks are wrong, perhaps without looking so",
                "a kernel that is named wrong above is the cause; else try OMNI_SP_SHARED_MEMORY=0 or, on GPUs, "
                f"NCCL_P2P_DISABLE=1, which tells memory or link errors, and {_REPORT}",
            )
        )
    if restless:
        rank, one = restless[0]
        found.append(
            Finding(
                "error",
                "attention over ranks",
                f"{one.layout}, {one.problem}: rank {rank} gets other bits when it is repeated",
                "a seed does not give the same picture twice; on GPUs it can be faulty memory",
                "name a deterministic kernel with --attention-backend, test the GPU's memory (dcgmi diag -r 3), and "
                f"{_REPORT}",
            )
        )
    if not found:
        worst = max(one.error for _, one in every if one.allowed < EXACT)
        found.append(
            Finding(
                "ok",
                "attention over ranks",
                f"{len(every)} results of {', '.join(layouts)}: equal to float64 (float32 within {worst:.1e}), the "
                "same bits each time",
                "attention over these ranks is exact but for rounding",
            )
        )
    return found


def step_findings(answers: Sequence[StepResult]) -> list[Finding]:
    """Whether the demo model draws over all ranks what it draws on one, and the same bits each time.

    Args:
        answers: of each rank, see `omni_sp.doctor.rank_proof.demo_step`.
    """
    found = []
    off = {
        (rank, stage): error
        for rank, one in enumerate(answers)
        for stage, error in one.errors.items()
        if not error <= (EXACT if stage.endswith("call 1") else AMPLIFIED)
    }
    if off or any(one.not_finite for one in answers):
        (rank, stage), error = max(off.items(), key=lambda item: item[1]) if off else ((0, "result"), float("nan"))
        found.append(
            Finding(
                "error",
                "demo model",
                f"{stage}: rank {rank} differs from one process by {error:.1e}",
                "pictures over several ranks are wrong",
                "see the findings on kernels and attention above; `omni-sp check` shows each stage of your own model",
            )
        )
    if restless := [rank for rank, one in enumerate(answers) if not one.repeats]:
        found.append(
            Finding(
                "error",
                "demo model",
                f"rank {', '.join(map(str, restless))}: two steps, repeated with the same seed, give other bits",
                "a seed does not give the same picture twice",
                "unset variables that choose other algorithms (CUDNN_*, CUBLAS_*), test the GPU's memory "
                f"(dcgmi diag -r 3), and {_REPORT}",
            )
        )
    if not found:
        worst = max(error for one in answers for error in one.errors.values())
        found.append(
            Finding(
                "ok",
                "demo model",
                f"two steps over {len(answers)} {_ranks(len(answers))}: within {worst:.1e} of one process, the same "
                "bits each time",
                "a whole pipeline draws over these ranks what it draws on one",
            )
        )
    return found


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"
