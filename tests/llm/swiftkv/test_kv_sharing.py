"""How a SwiftKV model's configuration is completed, and what is refused by vLLM's own; no vLLM is needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.swiftkv import kv_sharing
from omni_sp.llm.swiftkv.config import LlamaSwiftKVConfig
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.config import LlmParallelConfig
from omni_sp.llm.vllm.step_metrics import StepCounter


@pytest.fixture(autouse=True)
def context(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for vLLM's modules, and the context of a step; tests change it."""
    step = SimpleNamespace(attn_metadata=None)
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.99.0", "ModelRegistry": SimpleNamespace(register_model=lambda *_: None)},
        "vllm.forward_context": {"get_forward_context": lambda: step},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {}, "VerifyAndUpdateConfig": object},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return step


def config(**changes: Any) -> SimpleNamespace:
    model = LlamaSwiftKVConfig(num_hidden_layers=4, num_key_value_layers=2)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model, enforce_eager=False),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        additional_config=changes.get("additional_config", {"mine": 1}),
    )


def test_a_configuration_is_completed_where_vllm_looks_for_it() -> None:
    kv_sharing.register()
    hooks = sys.modules["vllm.model_executor.models.config"].__dict__["MODELS_CONFIG_MAP"]
    assert set(hooks) == {"LlamaSwiftKVForCausalLM", "Qwen2SwiftKVForCausalLM", "Qwen3SwiftKVForCausalLM"}
    made = config()
    hooks["LlamaSwiftKVForCausalLM"].verify_and_update_config(made)
    assert made.model_config.enforce_eager
    assert made.cache_config.kv_sharing_fast_prefill
    assert made.additional_config["mine"] == 1
    settings = internals.settings_of(made)
    assert settings is not None
    assert settings.swiftkv
    assert not settings.is_sharded
    assert settings.world_size == 2
    counter = StepCounter.open(settings.step_counts_file)
    assert counter is not None
    counter.add_swiftkv(early_tokens=9, late_tokens=2)
    counter.add_swiftkv(early_tokens=1, late_tokens=1)
    assert counter.read()[-2:] == (10, 3)


def test_a_vllm_without_the_table_runs_as_ever() -> None:
    for name in ("MODELS_CONFIG_MAP", "VerifyAndUpdateConfig"):
        del sys.modules["vllm.model_executor.models.config"].__dict__[name]
        kv_sharing.register()
    del sys.modules["vllm.model_executor.models.config"]
    kv_sharing.register()


def test_settings_of_flags_stay() -> None:
    given = LlmParallelConfig(sequence_parallel_size=2, step_counts_file="counts")
    made = config(additional_config=given.additional_config())
    kv_sharing.complete_config(made)
    assert internals.settings_of(made) == replace(given, swiftkv=True)


def test_a_configuration_that_is_impossible_or_no_dict_is_refused() -> None:
    made = config(additional_config=[1])
    with pytest.raises(ConfigError, match="additional_config is a list"):
        kv_sharing.complete_config(made)
    made.model_config.hf_config.num_key_value_layers = 4
    with pytest.raises(ConfigError, match="num_key_value_layers=4"):
        kv_sharing.complete_config(made)
    with pytest.raises(UnsupportedModelError, match="did not complete"):
        kv_sharing.require_supported(config())


def test_sampled_rows_are_those_of_the_readers_metadata(context: SimpleNamespace) -> None:
    assert kv_sharing.sampled_rows("reader") == (False, None)
    own = SimpleNamespace()
    context.attn_metadata = {"reader": own}
    assert kv_sharing.sampled_rows("reader") == (True, None)
    own.logits_indices_padded, own.num_logits_indices = torch.tensor([3, 7, 9, 9]), 3
    is_step, rows = kv_sharing.sampled_rows("reader")
    assert is_step
    assert rows is not None
    assert rows.tolist() == [3, 7, 9]
    context.attn_metadata = [{}, {}]
    with pytest.raises(UnsupportedModelError, match=r"vLLM 0\.99\.0 gives the metadata of attention as a list"):
        kv_sharing.sampled_rows("reader")


def test_layers_whose_cache_would_be_read_wrongly_are_refused() -> None:
    backend = SimpleNamespace(forward_includes_kv_cache_update=False, get_name=lambda: "MINE")
    writer = SimpleNamespace(**dict.fromkeys(kv_sharing._WRITER_ATTRIBUTES), _k_scale_float=1.0, _v_scale_float=0.5)
    writer.attn_backend, writer.layer_name = backend, "layers.2.attn"
    kv_sharing.require_writer(writer)
    writer.sliding_window = 16
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.attn attends to a sliding window"):
        kv_sharing.require_writer(writer)
    writer.sliding_window, backend.forward_includes_kv_cache_update = None, True
    with pytest.raises(UnsupportedModelError, match="MINE stores keys and values only while it attends"):
        kv_sharing.require_writer(writer)
    reader = SimpleNamespace(layer_name="layers.2.reader", _k_scale_float=1.0, _v_scale_float=0.5)
    kv_sharing.require_same_scales(writer, reader)
    reader._v_scale_float = 1.0
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.reader reads keys and values with the scale 1\.0"):
        kv_sharing.require_same_scales(writer, reader)


def test_a_layer_that_vllm_does_not_know_cannot_be_forgotten() -> None:
    attention = SimpleNamespace(layer_name="layers.3.attn")
    context = {"layers.3.attn": attention}
    made = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    kv_sharing.forget_layer(made, attention)
    assert not context
    with pytest.raises(UnsupportedModelError, match=r"does not know layers\.3\.attn"):
        kv_sharing.forget_layer(made, attention)
