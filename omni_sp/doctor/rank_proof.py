"""What ranks prove together: attention over all of them, a step of the demo model, and that a repetition is the same.

The functions run on every rank, see `omni_sp.doctor.ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from omni_sp.attention import SequenceLayout, WholeKeyMask, sequence_parallel_attention
from omni_sp.attention.kernels import exact_kernels, load_kernel
from omni_sp.attention.kernels.registry import is_usable
from omni_sp.attention.reference import attention, relative_error
from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.doctor.kernel_proof import KernelError, kernel_errors, provable
from omni_sp.doctor.ranks import Rank
from omni_sp.engine.messages import Call
from omni_sp.engine.pipeline_runner import PipelineRunner
from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.arguments import Prompt, call_arguments, small_arguments

REPEATS = 3
EXACT, AMPLIFIED = 1e-5, 1e-3
"""Relative differences in float32: of one transformer call, and of what later steps make of it."""


@dataclass(frozen=True)
class Problem:
    """An attention over all ranks: each holds another number of tokens, the last one none.

    Attributes:
        name: for people.
        heads: of the queries.
        kv_heads: of keys and values.
        dtype: of all.
        masked: some keys may not be attended; every rank knows which.
        causal: each token attends to itself and to earlier ones.
        allowed: the largest relative error.
    """

    name: str
    heads: int = 5
    kv_heads: int = 5
    dtype: torch.dtype = torch.float32
    masked: bool = False
    causal: bool = False
    allowed: float = 5e-6


PROBLEMS = (
    Problem("uneven, one rank without tokens"),
    Problem("grouped heads, masked", heads=6, kv_heads=2, masked=True),
    Problem("causal", causal=True),
    Problem("bfloat16", dtype=torch.bfloat16, allowed=2.0**-7),
)


@dataclass(frozen=True)
class SequenceError:
    """What one rank got of an attention over all ranks.

    Attributes:
        layout: the degrees, such as "ulysses 2 x ring 2".
        problem: the name of the attention.
        error: of this rank's part, relative to float64; nan for numbers that are none.
        allowed: the largest one that may be.
        repeats: whether a repetition gave the same bits.
    """

    layout: str
    problem: str
    error: float
    allowed: float
    repeats: bool


def kernels(rank: Rank) -> tuple[list[str], list[KernelError]]:
    """The exact kernels that were tried on this rank's device, such as "cpu_flash float32", and what is wrong."""
    tried, errors = [], []
    for name, dtype in provable([name for name in exact_kernels() if is_usable(name)], rank.device):
        tried.append(f"{name} {str(dtype).removeprefix('torch.')}")
        errors += kernel_errors(load_kernel(name), rank.device, dtype)
    return tried, errors


def sequences(rank: Rank) -> list[SequenceError]:
    """Attention over all ranks, in every layout of Ulysses and ring that has so many ranks."""
    return list(sequence_errors(rank.mesh.world_size, rank.device))


def sequence_errors(num_ranks: int, device: torch.device) -> Iterator[SequenceError]:
    """The same for any job of so many ranks, of which this process is one."""
    for ulysses in range(1, num_ranks + 1):
        if num_ranks % ulysses:
            continue
        ring = num_ranks // ulysses
        mesh = ParallelMesh(DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring))
        for problem in PROBLEMS:
            error, repeats = _sequence_error(mesh, device, problem)
            yield SequenceError(f"ulysses {ulysses} x ring {ring}", problem.name, error, problem.allowed, repeats)


def _sequence_error(mesh: ParallelMesh, device: torch.device, problem: Problem) -> tuple[float, bool]:
    generator = torch.Generator().manual_seed(11)
    several = mesh.world_size > 1
    lengths = (*(max(37 - 3 * rank, 1) for rank in range(mesh.world_size - 1)), 0) if several else (37,)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, sum(lengths), heads, 64, generator=generator).to(problem.dtype)

    query, key, value = draw(problem.heads), draw(problem.kv_heads), draw(problem.kv_heads)
    mask = torch.rand(2, sum(lengths), generator=generator) < 0.6 if problem.masked else None
    wanted = attention(query, key, value, key_mask=mask, is_causal=problem.causal)
    start = sum(lengths[: mesh.sequence.rank])
    own = slice(start, start + lengths[mesh.sequence.rank])
    outs = [
        sequence_parallel_attention(
            *(x[:, own].to(device) for x in (query, key, value)),
            mesh=mesh,
            key_mask=None if mask is None else WholeKeyMask(mask, lengths),
            is_causal=problem.causal,
            layout=SequenceLayout(lengths, lengths),
        )
        for _ in range(REPEATS)
    ]
    repeats = all(torch.equal(outs[0], out) for out in outs[1:])
    return relative_error(outs[0].cpu(), wanted[:, own]) if outs[0].numel() else 0.0, repeats


@dataclass(frozen=True)
class StepResult:
    """What one rank got of the demo model.

    Attributes:
        errors: stage -> the largest difference from one process, relative to the stage's largest number.
        repeats: whether every repetition of the same call gave the same bits.
        not_finite: whether there was a number that is none.
    """

    errors: dict[str, float]
    repeats: bool
    not_finite: bool


def demo_step(rank: Rank) -> StepResult:
    """Two steps of the demo model in float32 over all ranks, compared with one process, and repeated."""
    torch.backends.cudnn.allow_tf32 = False
    runner = PipelineRunner(rank.options, str(rank.device))
    try:
        capabilities = runner.parallelize(rank.mesh).capabilities
        params, prompt = OmniDiffusionSamplingParams(), Prompt(text="a red circle on a blue background")
        arguments = small_arguments(capabilities, call_arguments(capabilities, prompt, params), params)
        call = Call(request_id="doctor", arguments=arguments, seeds=(5,))
        rows = []
        for _ in range(REPEATS):
            done = runner.run(call, latents=True)
            assert done.result is not None
            rows.append([torch.as_tensor(row).cpu() for row in done.result.images])
        checked = runner.check(Call(request_id="doctor", arguments=arguments, seeds=(5,), check="ranks"))
    finally:
        runner.close()
    same = all(torch.equal(one, other) for again in rows[1:] for one, other in zip(rows[0], again, strict=True))
    return StepResult(dict(checked.errors), same, any(not row.isfinite().all() for row in rows[0]))
