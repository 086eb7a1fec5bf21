"""What speculation takes from vLLM's runner and model, and how it names what is unknown or does not fit."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.speculation.checkpoint import SpeculatorConfig
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.vllm import internals, speculation_internals
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.internals import settings_of
from omni_sp.llm.vllm.speculation_internals import (
    RequestBatch,
    expand_batch_to_tokens,
    proposer_of,
    require_heads_fit,
    take_states,
)


@pytest.fixture(autouse=True)
def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "version", lambda: "0.99.0")


def test_a_runner_without_what_the_proposer_needs_is_named() -> None:
    batch = SimpleNamespace(req_ids=["a"], req_id_to_index={"a": 0})
    runner = SimpleNamespace(drafter="ours", input_batch=batch)
    assert proposer_of(runner) == "ours"
    requests = RequestBatch(runner)
    assert requests.names == ["a"]
    assert "a" in requests
    assert "b" not in requests
    for missing in (SimpleNamespace(), SimpleNamespace(input_batch=SimpleNamespace(req_ids=[]))):
        with pytest.raises(UnsupportedModelError, match=r"0\.99\.0 has no \w+ in its runner"):
            RequestBatch(missing)
    with pytest.raises(UnsupportedModelError, match="num_computed_tokens_cpu"):
        RequestBatch(runner, needs_rows=True)
    batch.num_computed_tokens_cpu = []
    with pytest.raises(UnsupportedModelError, match="query_start_loc"):
        RequestBatch(runner, needs_rows=True)
    with pytest.raises(UnsupportedModelError, match="drafter"):
        proposer_of(SimpleNamespace())


def test_the_row_of_a_state_is_that_of_the_token_before_the_last_one() -> None:
    """A prompt at once, a prompt's last chunk, one token, and drafts of which two of three, and none, were accepted."""
    steps = [(0, 5, 6), (3, 4, 8), (9, 1, 11), (20, 4, 24), (30, 4, 32)]  # computed before, in the step, tokens now
    computed, tokens, counts = map(np.array, zip(*steps, strict=True))
    starts = np.cumsum([0, *tokens])
    batch = SimpleNamespace(req_ids=[], req_id_to_index={}, num_computed_tokens_cpu=computed)
    runner = SimpleNamespace(input_batch=batch, query_start_loc=SimpleNamespace(np=starts))
    rows = RequestBatch(runner, needs_rows=True).hidden_rows([0, 1, 2, 3, 4], counts)
    assert rows == [4, 5 + 3, 9, 10 + 2, 14 + 0]


def test_values_of_requests_are_repeated_for_the_tokens_of_their_drafts() -> None:
    temperatures, ends = torch.tensor([0.8, 0.0, 0.5, 1.5]), torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    found = expand_batch_to_tokens(temperatures, ends, 6, replace_from=0, replace_to=1)
    assert torch.equal(found, torch.tensor([0.8, 0.8, 1.0, 1.5, 1.5, 1.5]))
    top_k = expand_batch_to_tokens(torch.tensor([5, 7], dtype=torch.int32), ends[:2], 3)
    assert (top_k.tolist(), top_k.dtype) == ([5, 5, 7], torch.int32)


def largest_of(logits: Any, *, scale: float) -> Any:
    return logits.max() * scale  # which an empty tensor has not


def use_sampler(monkeypatch: pytest.MonkeyPatch, stock: Any) -> SimpleNamespace:
    """Put a function in the place of vLLM's own."""
    sampler = SimpleNamespace(expand_batch_to_tokens=stock, apply_sampling_constraints=largest_of)
    monkeypatch.setattr(speculation_internals, "runs_on_cpu", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.rejection_sampler", sampler)
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    return sampler


@pytest.mark.parametrize("is_right", [False, True])
def test_a_build_that_leaves_them_unfilled_is_repaired(monkeypatch: pytest.MonkeyPatch, is_right: bool) -> None:
    def stock(values: Any, ends: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        found = expand_batch_to_tokens(values, ends, num_tokens, replace_from, replace_to)
        return found if is_right else torch.full_like(found, 7)

    sampler = use_sampler(monkeypatch, stock)
    speculation_internals.repair_sampling()
    assert (sampler.expand_batch_to_tokens is stock) == is_right
    assert sampler.apply_sampling_constraints(torch.tensor([[1.0, 3.0]]), scale=2.0) == 6.0
    none = torch.zeros(0, 2)  # a step without drafts
    assert sampler.apply_sampling_constraints(none, scale=2.0) is none


def test_a_build_whose_verification_needs_triton_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(*_: Any, **__: Any) -> Any:
        raise TypeError("Cannot inspect kernel parameters for function")

    use_sampler(monkeypatch, stock)
    with pytest.raises(ConfigError, match=r"vLLM 0\.99\.0 cannot verify drafts on this CPU.*use vLLM 0\.31 or newer"):
        speculation_internals.repair_sampling()


def test_a_worker_hands_over_its_runner_and_keeps_the_counts_out_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LlmParallelConfig(speculation=SpeculationSettings(), step_counts_file="/tmp/counts")
    attached: list[Any] = []

    class Stock:
        vllm_config = SimpleNamespace(additional_config=settings.additional_config())
        model_runner = SimpleNamespace(drafter=SimpleNamespace(attach=attached.append))

        def load_model(self) -> str:
            return "loaded"

    monkeypatch.setattr(speculation_internals, "stock_worker_class", lambda: Stock)
    monkeypatch.setattr(speculation_internals, "repair_sampling", lambda: None)
    module = "omni_sp.llm.speculation.worker"
    monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        worker = importlib.import_module(module).Worker()
    finally:
        sys.modules.pop(module)
    assert worker.load_model() == "loaded"
    assert attached == [worker.model_runner]
    assert settings_of(worker.vllm_config) == LlmParallelConfig(speculation=SpeculationSettings())


CONFIG = SpeculatorConfig(
    kind="mlp", n_predict=3, vocab_size=16, input_width=8, width=4, base_architectures=("LlamaForCausalLM",)
)


def vllm_config(**changed: Any) -> SimpleNamespace:
    text = SimpleNamespace(vocab_size=16, hidden_size=8)
    model = {"hf_text_config": text, "architectures": ["LlamaForCausalLM"], "enforce_eager": True}
    parallel = {"pipeline_parallel_size": 1, "use_ubatching": False}
    entries = model | parallel | changed
    settings = LlmParallelConfig(speculation=SpeculationSettings(head="S", head_tokens=3))
    return SimpleNamespace(
        additional_config=settings.additional_config(),
        compilation_config=SimpleNamespace(mode=SimpleNamespace(name="DYNAMO_TRACE_ONCE")),
        model_config=SimpleNamespace(**{name: entries[name] for name in model}),
        parallel_config=SimpleNamespace(**{name: entries[name] for name in parallel}),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hf_text_config": SimpleNamespace(vocab_size=17, hidden_size=8)}, "speculator S has the vocab_size 16"),
        (
            {"hf_text_config": SimpleNamespace(vocab_size=16, hidden_size=9)},
            "width of hidden states 8, .* 9",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "is a Qwen2ForCausalLM"),
        ({"enforce_eager": False}, "add --enforce-eager"),
        ({"pipeline_parallel_size": 2}, "leave --pipeline-parallel-size"),
        ({"use_ubatching": True}, "leave --enable-dbo"),
    ],
)
def test_a_speculator_that_does_not_fit_is_refused_on_the_ranks(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    target = SimpleNamespace(kept_states=None)
    monkeypatch.setattr(internals, "runs_on_cpu", lambda: False)
    require_heads_fit(vllm_config(), "S", CONFIG, target)
    with pytest.raises(ConfigError, match=message):
        require_heads_fit(vllm_config(**changed), "S", CONFIG, target)


def test_on_a_cpu_a_speculator_drafts_from_what_a_compiled_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "runs_on_cpu", lambda: True)
    require_heads_fit(vllm_config(enforce_eager=False), "S", CONFIG, SimpleNamespace(kept_states=None))


def test_a_model_whose_class_keeps_no_states_is_refused_and_states_are_given_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"SimpleNamespace keeps no hidden states.*LlamaForCausalLM"):
        require_heads_fit(vllm_config(), "S", CONFIG, SimpleNamespace())
    states = torch.zeros(1)
    target = SimpleNamespace(kept_states=states)
    assert take_states(target) is states
    with pytest.raises(AssertionError):
        take_states(target)
