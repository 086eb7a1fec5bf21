"""Weights in fp8 inside vLLM, by log-probabilities: rounding decides tokens that are nearly as likely."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_sp.testing.components import VOCABULARY_SIZE
from omni_sp.testing.models import save_language_model, save_swiftkv_model
from tests.thorough import thorough_only

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

from tests.llm.vllm.test_engines import engine, finished, prompts

pytestmark = thorough_only
THRESHOLD = 20
LONG, SHORT = (34, 61, 50), (5, 12, 20, 1)  # by Ulysses, and by tensor parallelism with shift
BATCHES = [[prompt] for prompt in prompts(*LONG, *SHORT)]
SHIFT = {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True, "shift_parallel_threshold": THRESHOLD}


def logprobs(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Log-probabilities of the first token after long and short prompts; and what else the engine says."""
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_logprobs": VOCABULARY_SIZE, **options}
    result = engine(folder, BATCHES, count=1, more={"logprobs": VOCABULARY_SIZE}, **options)
    found = torch.tensor(result["logprobs"][: len(BATCHES)])
    return {"long": found[: len(LONG)], "short": found[len(LONG) :]}, result


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def test_each_way_rounds_as_vllm_itself_does_on_as_many_ranks(tmp_path: Path) -> None:
    """Ulysses as one rank, steps by tensor parallelism as vLLM's on two ranks, and two by two as two ranks."""
    model = save_language_model("llama", tmp_path)
    plain, _ = logprobs(tmp_path)
    alone, _ = logprobs(tmp_path, quantization="fp8_per_channel")
    stock, _ = logprobs(tmp_path, quantization="fp8_per_channel", tensor_parallel_size=2)
    shared, result = logprobs(tmp_path, quantization="fp8_per_channel", **SHIFT)
    assert result["steps"][0] >= len(LONG)
    assert result["steps"][2] >= len(SHORT)
    assert distance(shared["long"], alone["long"]) <= 1e-6
    assert distance(shared["short"], stock["short"]) <= 1e-6
    # Ranks scale the activations that they see: other roundings than one rank's, within what fp8 itself changes.
    assert 0 < distance(shared["short"], alone["short"]) < distance(alone["short"], plain["short"])
    config = model.config
    layer = 2 * config.hidden_size * 32 * (4 + 2) + 3 * config.hidden_size * config.intermediate_size
    for rank in result["memory"]:  # a byte for each number, and nothing beside it for the other kind of steps
        assert rank["matrices"] == config.num_hidden_layers * layer
    two_by_two, result = logprobs(
        tmp_path, quantization="fp8_per_channel", tensor_parallel_size=2, ulysses_sequence_parallel_size=2
    )
    assert result["steps"][0]
    for length in ("long", "short"):
        assert distance(two_by_two[length], stock[length]) <= 1e-6


def test_a_swiftkv_model_in_fp8(tmp_path: Path) -> None:
    save_swiftkv_model("llama", tmp_path)
    plain, _ = logprobs(tmp_path)
    stock, _ = logprobs(tmp_path, quantization="fp8_per_channel", tensor_parallel_size=2)
    shared, _ = logprobs(tmp_path, quantization="fp8_per_channel", **SHIFT)
    assert distance(shared["short"], stock["short"]) <= 1e-6
    assert distance(shared["long"], stock["long"]) < distance(stock["long"], plain["long"])


def test_scales_of_blocks_that_parts_would_cut_are_refused_by_name(tmp_path: Path) -> None:
    save_language_model("llama", tmp_path)
    options = {"model": str(tmp_path), "dtype": "bfloat16", "max_model_len": 128, "quantization": "fp8_per_block"}
    case = {"options": options | SHIFT, "batches": [], "aborts": False, "count": 1}
    (tmp_path / "case.json").write_text(json.dumps(case))
    done = finished([sys.executable, "-m", "tests.llm.vllm.run_vllm", "case.json", "result.json"], tmp_path)
    assert done.returncode
    if "Failed to find a kernel" in done.stdout + done.stderr:
        pytest.skip("vLLM has no kernel here for scales of blocks; tests/llm/vllm/test_matrix_parts.py has the refusal")
    assert "has no parts for steps by tensor parallelism" in done.stdout + done.stderr
