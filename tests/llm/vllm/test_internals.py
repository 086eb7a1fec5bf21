"""What the ranks refuse by vLLM's own configuration, and how they name what is unknown inside vLLM."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.speculation.settings import SpeculationSettings
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.config import LlmParallelConfig

SETTINGS = LlmParallelConfig(sequence_parallel_size=2, enable_shift_parallel=True)
HANDLED: dict[str, Any] = {
    "parallel_config.tensor_parallel_size": 2,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.data_parallel_size": 1,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "model_config.hf_text_config.num_attention_heads": 4,
    "model_config.uses_mrope": False,
    "model_config.runner_type": "generate",
    "model_config.enforce_eager": True,
    "cache_config.kv_sharing_fast_prefill": False,
    "lora_config": None,
    "quant_config": None,
    "speculative_config": None,
}


def config(entries: dict[str, Any]) -> SimpleNamespace:
    """A configuration by paths."""
    whole = SimpleNamespace()
    for path, value in entries.items():
        *owners, name = path.split(".")
        at = whole
        for owner in owners:
            at.__dict__.setdefault(owner, SimpleNamespace())
            at = getattr(at, owner)
        setattr(at, name, value)
    return whole


def test_a_plain_engine_is_handled_and_so_is_n_gram_speculation() -> None:
    internals.require_supported_config(config(HANDLED), SETTINGS)
    ngram = {"speculative_config": SimpleNamespace(method="ngram")}
    internals.require_supported_config(config(HANDLED | ngram), SETTINGS)


def test_a_swiftkv_model_shares_its_cache_and_is_named_where_it_refuses() -> None:
    fast = HANDLED | {"cache_config.kv_sharing_fast_prefill": True}
    swiftkv = replace(SETTINGS, swiftkv=True)
    internals.require_supported_config(config(fast), swiftkv, what="SwiftKV")
    for path, value in (("lora_config", SimpleNamespace()), ("parallel_config.use_ubatching", True)):
        with pytest.raises(ConfigError, match="SwiftKV does not run with"):
            internals.require_supported_config(config(fast | {path: value}), swiftkv, what="SwiftKV")


def test_a_custom_class_is_handled_where_it_is_ours() -> None:
    custom = config(HANDLED | {"speculative_config": SimpleNamespace(method="custom_class")})
    internals.require_supported_config(custom, replace(SETTINGS, speculation=SpeculationSettings()))
    with pytest.raises(ConfigError, match="'custom_class'"):
        internals.require_supported_config(custom, SETTINGS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parallel_config.tensor_parallel_size", 4, "tensor_parallel_size=4"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        ("parallel_config.data_parallel_size", 3, "--data-parallel-size 3"),
        ("parallel_config.decode_context_parallel_size", 2, "leave decode_context_parallel_size"),
        ("parallel_config.prefill_context_parallel_size", 2, "leave prefill_context_parallel_size"),
        ("parallel_config.use_ubatching", True, "leave --enable-dbo"),
        ("model_config.hf_text_config.num_attention_heads", 3, "3 attention heads"),
        ("model_config.uses_mrope", True, "mrope"),
        ("model_config.hf_text_config.dual_chunk_attention_config", {"chunk_size": 8}, "dual chunk attention"),
        ("model_config.runner_type", "pooling", "this runs for 'pooling'"),
        ("model_config.enforce_eager", False, "two programs.*add --enforce-eager"),
        ("cache_config.kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill: leave it"),
        ("lora_config", SimpleNamespace(), "--enable-lora"),
        ("quant_config", SimpleNamespace(get_name=lambda: "gptq"), "quantised by 'gptq'"),
        ("speculative_config", SimpleNamespace(method="eagle3"), "speculation by 'eagle3'"),
    ],
)
def test_what_does_not_run_beside_sequence_parallelism_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        internals.require_supported_config(config(HANDLED | {path: value}), SETTINGS)


def test_a_decoder_alone_is_compiled_on_a_cpu(vllm: dict[str, Any]) -> None:
    """Not beside CUDA graphs, and not together with what its class does in Python."""
    settings = LlmParallelConfig(sequence_parallel_size=2)
    entries = HANDLED | {"model_config.enforce_eager": False}

    def compiled(mode: str) -> SimpleNamespace:
        return config(entries | {"compilation_config.mode": SimpleNamespace(name=mode)})

    internals.require_supported_config(compiled("DYNAMO_TRACE_ONCE"), settings)
    internals.require_supported_config(compiled("NONE"), settings)
    with pytest.raises(ConfigError, match="not STOCK_TORCH_COMPILE: leave the mode in --compilation-config"):
        internals.require_supported_config(compiled("STOCK_TORCH_COMPILE"), settings)
    with unknown(r"has no mode in its configuration \(compilation_config.mode\)"):
        internals.require_supported_config(config(entries | {"compilation_config.other": 1}), settings)
    with pytest.raises(ConfigError, match=r"a SwiftKV model .*add --enforce-eager"):
        internals.require_supported_config(compiled("NONE"), replace(settings, swiftkv=True), what="SwiftKV")
    vllm["vllm.platforms"].current_platform.is_cpu = lambda: False
    with pytest.raises(ConfigError, match=r"on GPUs .*add --enforce-eager"):
        internals.require_supported_config(compiled("DYNAMO_TRACE_ONCE"), settings)


def test_the_file_that_counts_steps_is_no_part_of_the_key_of_what_is_compiled() -> None:
    settings = LlmParallelConfig(sequence_parallel_size=2, step_counts_file="/tmp/counts")
    made = SimpleNamespace(additional_config=settings.additional_config({"theirs": 1}))
    given = made.additional_config
    internals.keep_out_of_compile_key(made)
    assert made.additional_config["theirs"] == 1
    assert internals.settings_of(made) == LlmParallelConfig(sequence_parallel_size=2)
    assert given["omni_sp"]["step_counts_file"] == "/tmp/counts"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for vLLM's modules, by name; tests change them."""

    def all_reduce(input_: Any) -> Any:
        return input_

    def make(group_ranks: Any, local_rank: int, backend: str, group_name: str | None = None) -> None: ...

    group = SimpleNamespace(**dict.fromkeys(internals._GROUP_ATTRIBUTES), local_rank=0)
    group.rank_in_group, group.world_size = 1, 2
    step = SimpleNamespace(slot_mapping={"layer": SimpleNamespace(shape=(7,))})

    class QKVParallelLinear:
        """vLLM's layer, as far as we use it: a shard by the group in parallel_state."""

        skip_bias_add, return_bias, gather_output = False, True, False

        def __init__(
            self,
            hidden_size: int,
            head_size: int,
            total_num_heads: int,
            total_num_kv_heads: int,
            bias: bool,
            quant_config: Any,
            params_dtype: Any,
            prefix: str,
        ) -> None:
            self.hidden_size, self.head_size, self.v_head_size = hidden_size, head_size, head_size
            self.total_num_heads, self.total_num_kv_heads = total_num_heads, total_num_kv_heads
            self.bias, self.quant_config, self.params_dtype, self.prefix = bias or None, None, params_dtype, prefix
            self.quant_method = SimpleNamespace(apply=None)
            group = sys.modules["vllm.distributed.parallel_state"]._TP
            self.tp_rank, self.tp_size = group.rank_in_group, group.world_size

    parts: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.99.0"},
        "vllm.forward_context": {"get_forward_context": lambda: step},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: 1,
            "tensor_model_parallel_all_reduce": all_reduce,
        },
        "vllm.distributed.parallel_state": {
            "_TP": group,
            "get_tp_group": lambda: group,
            "get_world_group": lambda: group,
            "init_model_parallel_group": make,
        },
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {"QKVParallelLinear": QKVParallelLinear},
    }
    modules: dict[str, Any] = {}
    for name, content in parts.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, modules[name])
        above, _, own = name.rpartition(".")
        if above:
            setattr(modules[above], own, modules[name])
    return modules


def unknown(difference: str) -> Any:
    """The error that names this difference, the installed version, and the tested ones."""
    return pytest.raises(
        UnsupportedModelError, match=rf"vLLM 0\.99\.0 {difference}, and .* use vLLM {internals.TESTED}"
    )


@pytest.mark.parametrize("path", [path for path in HANDLED if "num_attention_heads" not in path])
def test_a_missing_setting_of_vllm_is_named(path: str) -> None:
    entries = {name: value for name, value in HANDLED.items() if name != path}
    with unknown(rf"has no \w+ in its configuration \({path}\)"):
        internals.require_supported_config(config(entries), SETTINGS)


def test_the_most_tokens_of_a_step_are_vllms_own() -> None:
    path = "scheduler_config.max_num_batched_tokens"
    assert internals.max_step_tokens(config({path: 64})) == 64
    with unknown(rf"has no scheduler_config in its configuration \({path}\)"):
        internals.max_step_tokens(config({}))


def test_a_missing_decoder_of_vllm_is_named(vllm: dict[str, Any]) -> None:
    with unknown(r"has no Qwen3ForCausalLM in vllm\.model_executor\.models\.qwen3"):
        internals.stock_class("Qwen3ForCausalLM")


def test_a_configuration_without_our_settings_leaves_vllm_unchanged() -> None:
    assert internals.settings_of(SimpleNamespace()) is None
    asked = SimpleNamespace(additional_config=SETTINGS.additional_config())
    assert internals.settings_of(asked) == SETTINGS


def test_functions_of_vllm_are_checked(vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    internals.require_known_vllm()
    state = vllm["vllm.distributed.parallel_state"]
    for module, name, parameters in internals._FUNCTIONS:
        with monkeypatch.context() as patch:
            patch.delattr(vllm[module], name)
            with unknown(f"has no {module}.{name}"):
                internals.require_known_vllm()
        if parameters:
            with monkeypatch.context() as patch:
                patch.setattr(vllm[module], name, lambda: None)
                with unknown(f"has no argument '{parameters[0]}' of {module}.{name}"):
                    internals.require_known_vllm()
    with monkeypatch.context() as patch:
        patch.delattr(state, "_TP")
        with unknown("has no vllm.distributed.parallel_state._TP"):
            internals.require_known_vllm()
    for part in internals._GROUP_ATTRIBUTES:
        with monkeypatch.context() as patch:
            patch.delattr(state.get_tp_group(), part)
            with unknown(f"has no {part} in its tensor parallel group"):
                internals.require_known_vllm()


def model() -> Any:
    """A decoder with the attributes that we use."""
    attention = SimpleNamespace(**dict.fromkeys(internals._ATTENTION_ATTRIBUTES))
    attention.attn = SimpleNamespace(**dict.fromkeys(internals._KV_CACHE_ATTRIBUTES))
    layer = SimpleNamespace(self_attn=attention, mlp=SimpleNamespace(**dict.fromkeys(internals._MLP_ATTRIBUTES)))
    return SimpleNamespace(model=SimpleNamespace(layers=[layer], embed_input_ids=None))


@pytest.mark.parametrize(
    ("owner", "part"),
    [
        ("", "model"),
        ("model", "layers"),
        ("model", "embed_input_ids"),
        ("model.layers.0", "self_attn"),
        ("model.layers.0", "mlp"),
        ("model.layers.0.self_attn", "qkv_proj"),
        ("model.layers.0.self_attn", "attn"),
        ("model.layers.0.self_attn.attn", "layer_name"),
        ("model.layers.0.mlp", "down_proj"),
    ],
)
def test_a_missing_attribute_of_a_decoder_is_named(owner: str, part: str) -> None:
    whole = at = model()
    assert internals.decoder_layers(whole) == whole.model.layers
    for name in filter(None, owner.split(".")):
        at = at[int(name)] if isinstance(at, list) else getattr(at, name)
    delattr(at, part)
    with unknown(f"has no {part} in SimpleNamespace.*"):
        internals.decoder_layers(whole)


def test_a_layer_whose_norm_is_adaptive_is_refused() -> None:
    whole = model()
    whole.model.layers[0].ada_rms_norm_t_cond = object()
    with pytest.raises(UnsupportedModelError, match="adaptive norm"):
        internals.decoder_layers(whole)


def test_a_step_has_a_slot_in_the_cache_for_each_token(vllm: dict[str, Any]) -> None:
    internals.require_slots("layer", 7)
    internals.require_slots("a layer of a trial run", 3)
    with unknown("runs a step of 8 tokens with 7 places in the cache, not one for each"):
        internals.require_slots("layer", 8)
    vllm["vllm.forward_context"].get_forward_context().slot_mapping = [{}, {}]
    with unknown("names the cache's places by a list, not by layer"):
        internals.require_slots("layer", 7)


QKV = "QKVParallelLinear"
INNER = internals.InnerRank(0, 1)


@pytest.fixture
def stock(vllm: dict[str, Any]) -> Any:
    cls = vllm["vllm.model_executor.layers.linear"].QKVParallelLinear
    return cls(8, 2, 4, 2, bias=True, quant_config=None, params_dtype=None, prefix="layers.0.qkv_proj")


def test_a_clone_holds_the_shard_of_its_group_and_vllms_own_group_stays(vllm: dict[str, Any], stock: Any) -> None:
    state = vllm["vllm.distributed.parallel_state"]
    before = state._TP
    clone = internals.clone_linear_for(stock, QKV, INNER)
    assert (clone.tp_rank, clone.tp_size) == (0, 1)
    assert (clone.total_num_heads, clone.total_num_kv_heads, clone.bias, clone.prefix) == (4, 2, True, stock.prefix)
    assert state._TP is before


@pytest.mark.parametrize("part", ["total_num_kv_heads", "params_dtype", "bias", "tp_size", "prefix"])
def test_a_missing_attribute_of_a_linear_layer_is_named(stock: Any, part: str) -> None:
    delattr(stock, part)
    with unknown(f"has no {part} in QKVParallelLinear"):
        internals.clone_linear_for(stock, QKV, INNER)


@pytest.mark.parametrize(
    ("part", "value"), [("skip_bias_add", True), ("gather_output", True), ("tp_size", 1), ("v_head_size", 1)]
)
def test_a_linear_layer_with_other_settings_is_refused(stock: Any, part: str, value: Any) -> None:
    setattr(stock, part, value)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.qkv_proj works with {part}={value}"):
        internals.clone_linear_for(stock, QKV, INNER)


def test_a_linear_layer_of_another_class_is_refused(vllm: dict[str, Any], stock: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="a SimpleNamespace stands where a QKVParallelLinear is expected"):
        internals.clone_linear_for(SimpleNamespace(), QKV, INNER)
    with unknown("has no RowParallelLinear"):
        internals.clone_linear_for(stock, "RowParallelLinear", INNER)


def test_a_linear_layer_with_another_constructor_is_named(
    vllm: dict[str, Any], stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = type(stock).__init__

    def takes_no_prefix(
        self: Any, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, bias: bool,
        quant_config: Any, params_dtype: Any,
    ) -> None: ...  # fmt: skip

    def uses_another_group(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        self.tp_rank, self.tp_size = 1, 2

    def has_no_method(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        self.quant_method = SimpleNamespace()

    monkeypatch.setattr(type(stock), "__init__", takes_no_prefix)
    with unknown("has no argument 'prefix' of QKVParallelLinear"):
        internals.clone_linear_for(stock, QKV, INNER)
    for init, difference in (
        (
            uses_another_group,
            r"makes a QKVParallelLinear for another group than [\w.]+\._TP",
        ),
        (has_no_method, r"has no apply in QKVParallelLinear\.quant_method"),
    ):
        init.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(stock), "__init__", init)
        with unknown(difference):
            internals.clone_linear_for(stock, QKV, INNER)


def test_a_matrix_that_vllm_packed_or_dropped_is_named() -> None:
    linear = SimpleNamespace(prefix="layers.0.o_proj", output_size_per_partition=4, input_size_per_partition=8)
    linear.weight = SimpleNamespace(shape=(4, 8))
    internals.require_unpacked(linear)
    linear.weight = SimpleNamespace(shape=(0,))
    with unknown(r"turned the matrix layers\.0\.o_proj, \(4, 8\), into \(0,\)"):
        internals.require_unpacked(linear)
    del linear.weight
    with unknown(r"turned the matrix layers\.0\.o_proj, \(4, 8\), into something else"):
        internals.require_unpacked(linear)


@pytest.mark.parametrize(
    ("method", "kernel", "text"),
    [
        ("UnquantizedLinearMethod", None, "not quantised"),
        ("Fp8Online", None, "quantised by Fp8Online"),
        ("Fp8PerChannel", "ChannelWise", "quantised by Fp8PerChannel with ChannelWise"),
    ],
)
def test_the_log_says_what_weights_have_become(method: str, kernel: str | None, text: str) -> None:
    """--quantization fp8 stands for other names in newer versions."""
    entries = {} if kernel is None else {"fp8_linear": type(kernel, (), {})()}
    assert internals.describe_quantisation(SimpleNamespace(quant_method=type(method, (), entries)())) == text
