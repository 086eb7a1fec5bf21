"""A SwiftKV model, a trained speculator beside suffix decoding, Ulysses, shift and weights in fp8, in one engine."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_sp.testing.components import VOCABULARY_SIZE
from omni_sp.testing.models import save_swiftkv_model
from tests.thorough import thorough_only

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

from omni_sp.llm.vllm.step_metrics import StepCounts
from tests.llm.vllm.test_engines import SMALL, SPECULATES, completed, engine, greedy, metrics, prompts, server
from tests.llm.vllm.test_speculators import ANSWER, SHIFT, trained

pytestmark = [
    thorough_only,
    pytest.mark.skipif(not SPECULATES, reason="this version's verification of drafts needs Triton"),
]
FP8 = {"dtype": "bfloat16", "quantization": "fp8_per_channel"}


def speculative_config(folder: Path) -> dict[str, Any]:
    """Both drafters."""
    speculator = str(folder / "speculator")
    return {"method": "arctic", "model": speculator, "enable_suffix_decoding": True, "disable_by_batch_size": 64}


@pytest.mark.parametrize(
    ("kind", "group", "tensor", "sequence"),
    [("llama", 1, 1, 1), ("qwen2", 2, 1, 2), ("qwen3", 1, 2, 2)],
)
def test_a_swiftkv_model_with_both_drafters_gives_the_references_tokens(
    tmp_path: Path, kind: str, group: int, tensor: int, sequence: int
) -> None:
    """Chunks, cached prefixes, aborted requests; then a temperature."""
    model = save_swiftkv_model(kind, tmp_path, num_layers=5, key_value_group_size=group)
    case = trained(tmp_path, "lstm", model)
    batch = [*case.batch[:2], case.batch[0] * 5, case.batch[-1]]
    states, tokens = torch.randn(6, 128), torch.randint(VOCABULARY_SIZE, (6,))
    result = engine(
        tmp_path,
        [batch, batch],
        count=ANSWER,
        aborts=True,
        more={"states": states.tolist(), "state_tokens": tokens.tolist()},
        tensor_parallel_size=tensor,
        ulysses_sequence_parallel_size=sequence,
        enable_prefix_caching=True,
        disable_log_stats=False,
        speculative_config=speculative_config(tmp_path),
        **(SHIFT if sequence > 1 else {}),
    )
    assert result["tokens"] == [[greedy(model, prompt, ANSWER) for prompt in batch]] * 2
    assert result["drafts"] == [case.speculator.draft(states, tokens, 3).tolist()] * (tensor * sequence)
    counts = StepCounts(*result["steps"])
    assert counts.accepted_tokens
    assert counts.head_accepted_tokens
    assert 0 < counts.late_tokens < counts.early_tokens
    assert bool(counts.ulysses_steps) == bool(counts.tensor_steps) == (sequence > 1)
    assert [len(answer) for answer in result["drawn"]] == [ANSWER] * len(batch)


def test_all_at_once_with_weights_in_fp8_through_both_doors(tmp_path: Path) -> None:
    """By the log-probabilities of first tokens: rounding decides tokens that are nearly as likely."""
    model = save_swiftkv_model("llama", tmp_path)
    trained(tmp_path, "lstm", model)
    long, short = (prompts(34, 61), prompts(5, 12, 1))
    batches = [[prompt] for prompt in [*long, *short]]
    options: dict[str, Any] = {**FP8, "max_logprobs": VOCABULARY_SIZE, "enforce_eager": True}
    more = {"logprobs": VOCABULARY_SIZE}
    alone = engine(tmp_path, batches, count=ANSWER, more=more, **options)
    stock = engine(tmp_path, batches, count=ANSWER, more=more, tensor_parallel_size=2, **options)
    config = speculative_config(tmp_path)
    shared: dict[str, Any] = {"ulysses_sequence_parallel_size": 2, **SHIFT}
    result = engine(tmp_path, batches, count=ANSWER, more=more, speculative_config=config, **shared, **options)
    counts = StepCounts(*result["steps"])
    assert counts.ulysses_steps
    assert counts.tensor_steps
    assert counts.drafts
    assert counts.head_drafts
    assert counts.late_tokens < counts.early_tokens
    found, one, two = (torch.tensor(each["logprobs"][: len(batches)]) for each in (result, alone, stock))
    # Steps by tensor parallelism are vLLM's own on two ranks. Long prompts pass early layers whole, and late ones so.
    assert (found[len(long) :] - two[len(long) :]).abs().max() <= 1e-6
    assert (found - one).abs().mean() < 0.25
    flags = [word for name, value in (SMALL | FP8).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--ulysses-sequence-parallel-size", "2", "--enable-shift-parallel", "--shift-parallel-threshold", "20"]
    flags += ["--max-logprobs", str(VOCABULARY_SIZE), "--speculative-config", json.dumps(config)]
    with server(tmp_path, [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path)], flags) as url:
        served = torch.tensor([first_logprobs(url, tmp_path, prompt) for prompt in [*long, *short]])
        assert (served - found).abs().max() <= 1e-6
        assert [len(tokens) for tokens in completed(url, tmp_path, [*long, *short])] == [12] * len(batches)
        counted = metrics(url)
        for name in ('steps_total{mode="ulysses"}', 'steps_total{mode="tensor"}', 'drafts_total{by="head"}'):
            assert counted[f"omni_sp_llm_{name}"], name
        early, late = (counted[f'omni_sp_llm_swiftkv_tokens_total{{layers="{name}"}}'] for name in ("early", "late"))
        assert 0 < late < early


def first_logprobs(url: str, model: Path, prompt: list[int]) -> list[float]:
    """Log-probabilities of the first token after a prompt, by token id."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": VOCABULARY_SIZE}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"return_tokens_as_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        table = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    return [table[f"token_id:{token}"] for token in range(VOCABULARY_SIZE)]
