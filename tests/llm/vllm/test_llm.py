"""Arguments of our LLM become vLLM's own, and invalid ones are refused before anything starts; vLLM is a stand-in."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.settings import PROPOSER, WORKER
from omni_sp.llm.vllm import internals


class StandIn:
    """vLLM's LLM, as far as it is called: it keeps what it is given."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.llm_engine: Any = None


@pytest.fixture
def llm_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Our class over the stand-in."""
    stand_in = ModuleType("vllm")
    stand_in.LLM = StandIn  # type: ignore[attr-defined]
    name = "omni_sp.llm.vllm.llm"
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(internals, "runs_on_cpu", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("M").mkdir()
    Path("M/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    yield importlib.import_module(name).LLM
    sys.modules.pop(name)


@pytest.mark.parametrize(
    "given",
    [
        {"speculative_config": {"method": "suffix", "num_speculative_tokens": 5}},
        {"spec_method": "suffix", "spec_tokens": 5},
        {"spec_method": "suffix", "spec_model": None, "speculative_config": {"num_speculative_tokens": 5}},
    ],
)
def test_suffix_decoding_by_vllms_arguments(llm_class: Any, given: dict[str, Any]) -> None:
    options = llm_class("M", **given).options
    assert options["speculative_config"] == {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 5}
    assert options["worker_cls"] == WORKER
    assert not [name for name in options if name.startswith("spec_")]


def test_what_is_vllms_own_stays(llm_class: Any) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    assert llm_class("M").options == {"model": "M", "tensor_parallel_size": 1}
    assert llm_class("M", speculative_config=ngram).options["speculative_config"] == ngram
    options = llm_class(
        "M", ulysses_sequence_parallel_size=1, tensor_parallel_size=2, enable_shift_parallel=True
    ).options
    assert options == {"model": "M", "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_shift_parallel": True}, "need ulysses_sequence_parallel_size"),
        ({"shift_parallel_threshold": 9}, "need ulysses_sequence_parallel_size"),
        ({"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": "false"}, "True or False"),
        ({"ulysses_sequence_parallel_size": True}, "whole number"),
        (
            {"ulysses_sequence_parallel_size": 2, "enable_shift_parallel": True, "enforce_eager": False},
            "two programs.*leave enforce_eager=False",
        ),
        ({"ulysses_sequence_parallel_size": 2, "enforce_eager": False}, "on GPUs.*leave enforce_eager=False"),
        ({"ulysses_sequence_parallel_size": 2, "spec_method": "eagle3", "spec_model": "x"}, "'eagle3'"),
        ({"speculative_config": '{"method": "suffix"}'}, "give a dict"),
        ({"speculative_config": {"method": "suffix"}, "spec_method": "suffix"}, "give one of them"),
        ({"spec_method": "suffix", "worker_cls": "mine.Worker"}, "leave worker_cls"),
        ({"ulysses_sequence_parallel_size": 2, "additional_config": {"omni_sp": {}}}, "one place"),
    ],
)
def test_invalid_arguments_are_refused(llm_class: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm_class("M", **options)


@pytest.mark.parametrize("given", [None, True, False])
def test_on_a_cpu_vllm_compiles_where_it_is_asked_to(
    llm_class: Any, monkeypatch: pytest.MonkeyPatch, given: bool | None
) -> None:
    seen: list[dict[str, Any]] = []

    def start(_self: Any, **options: Any) -> None:
        seen.append(options)
        raise InterruptedError

    monkeypatch.setattr(internals, "runs_on_cpu", lambda: True)
    monkeypatch.setattr(StandIn, "__init__", start)
    with pytest.raises(InterruptedError):
        llm_class("M", ulysses_sequence_parallel_size=2, **({} if given is None else {"enforce_eager": given}))
    assert seen[0]["enforce_eager"] is (given is not False)


def test_processes_without_the_plugin_are_an_error(llm_class: Any) -> None:
    with pytest.raises(ConfigError, match="did not load the plugin"):
        llm_class("M", ulysses_sequence_parallel_size=2)
