"""What needs a GPU: kernels, streams, replay, CUDA graphs, NCCL, and ranks that share a GPU. `make gpu-check` runs it.

Each rank is a process that `omni_sp.doctor.ranks` starts, with a bound on every wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omni_sp.attention import local_attention
from omni_sp.doctor import together
from omni_sp.doctor.examine import options_for
from omni_sp.doctor.measure import SIZES, transfers
from omni_sp.doctor.rank_proof import demo_step, kernels, sequences
from omni_sp.doctor.ranks import DoctorRanks
from tests.gpu.jobs import FORWARDS, Forwards, forwards, overlapped

ROOT = Path(__file__).resolve().parents[2]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
TIMEOUT_S = 300.0
KINDS = ["one", "shared", "nccl"]
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="there is no GPU: `make gpu-check` runs these where there is one")


@pytest.fixture(scope="module", params=KINDS)
def gpu_ranks(request: pytest.FixtureRequest) -> Iterator[DoctorRanks]:
    """One rank; two that share the first GPU, through the host; two with a GPU each, over NCCL."""
    kind = request.param
    if kind == "nccl" and NUM_GPUS < 2:
        pytest.skip("NCCL takes one rank a GPU, and there is one")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))  # the ranks import what they run
    options = options_for("cuda:0" if kind != "nccl" else "cuda", 1 if kind == "one" else 2)
    with DoctorRanks(options, TIMEOUT_S) as ranks:
        yield ranks
    patch.undo()


def test_every_kernel_equals_float64(gpu_ranks: DoctorRanks) -> None:
    answers = gpu_ranks.run(kernels)
    tried, _ = answers[0]
    assert any(name.startswith("cuda_") for name in tried)
    levels = {finding.level for finding in together.kernel_findings(answers)}
    assert "ok" in levels
    assert "error" not in levels, answers  # an old GPU may lack a kernel, which then raises


def test_attention_over_ranks_equals_float64(gpu_ranks: DoctorRanks) -> None:
    assert [finding.level for finding in together.sequence_findings(gpu_ranks.run(sequences))] == ["ok"]


def test_exchanges_on_streams_of_their_own_change_no_bit(gpu_ranks: DoctorRanks) -> None:
    assert all(gpu_ranks.run(overlapped))


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["replay", "graphs"])
def test_blocks_that_are_replayed_change_no_bit(gpu_ranks: DoctorRanks, cuda_graphs: bool) -> None:
    answers: list[Forwards] = gpu_ranks.run(forwards, cuda_graphs)
    assert all(one.same_bits and one.error <= 1e-5 for one in answers), answers
    if gpu_ranks.size > 1:  # one rank runs as it is
        assert all(one.replayed for one in answers)
        if cuda_graphs:
            # Ranks that share a GPU talk through the host, which no graph can hold: the reason is named.
            assert all(one.in_graphs or one.not_in_graphs for one in answers), answers
            assert all(one.in_graphs + sum(one.not_in_graphs.values()) == FORWARDS for one in answers), answers


def test_the_demo_model_draws_what_one_process_draws(gpu_ranks: DoctorRanks) -> None:
    assert [finding.level for finding in together.step_findings(gpu_ranks.run(demo_step))] == ["ok"]


def test_exchanges_are_timed(gpu_ranks: DoctorRanks) -> None:
    if gpu_ranks.size == 1:
        return
    for answer in gpu_ranks.run(transfers):
        assert [size for size, _ in answer.exchange] == list(SIZES["cuda"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_to_long_sequences(dtype: torch.dtype) -> None:
    """Beyond the 65 535 blocks of a launch's smaller dims, where kernels have failed."""
    query, key = (torch.randn(1, tokens, 2, 64, device="cuda", dtype=dtype) for tokens in (70_001, 257))
    out = local_attention(query, key, key)
    last = local_attention(query[:, -64:], key, key)
    assert torch.allclose(out[:, -64:].float(), last.float(), atol=1e-2 if dtype != torch.float32 else 1e-5)
