"""Everything that we rely on inside vLLM, each checked before it is used.

Tested with the versions in ``TESTED``. Differences between them are handled in this file only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.vllm.config import CONFIG_KEY, EngineFeatures, LlmParallelConfig
from omni_sp.mesh import Axis

TESTED = "0.30 to 0.32"
"""The versions of vLLM that are tested."""

# Architecture -> vLLM's module and class. All are one decoder: q/k/v in one matrix, rotary embedding, gated MLP.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
}

# Those that compile the decoder alone, once, around what its model class does in Python. vLLM for CPUs makes the second
# of its default.
_COMPILATION_MODES = ("NONE", "DYNAMO_TRACE_ONCE")
_PARALLEL = "vllm.distributed.parallel_state"
# Functions that we call, with the arguments that we pass by name.
_FUNCTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.distributed", "get_tensor_model_parallel_rank", ()),
    ("vllm.distributed", "tensor_model_parallel_all_reduce", ()),
    ("vllm.forward_context", "get_forward_context", ()),
    (_PARALLEL, "get_tp_group", ()),
    (_PARALLEL, "get_world_group", ()),
    (_PARALLEL, "init_model_parallel_group", ("group_ranks", "local_rank", "backend", "group_name")),
)
_GROUP_ATTRIBUTES = ("ranks", "rank_in_group", "world_size", "device_group", "all_reduce", "broadcast_object")
_ATTENTION_ATTRIBUTES = ("qkv_proj", "o_proj", "q_size", "kv_size", "num_heads", "num_kv_heads", "head_dim")
_MLP_ATTRIBUTES = ("gate_up_proj", "down_proj")
_KV_CACHE_ATTRIBUTES = ("forward", "layer_name", "head_size", "num_heads", "num_kv_heads")
# Arguments of a linear layer's constructor, which the layer keeps as attributes of the same names.
_LINEAR_ARGUMENTS = {
    "QKVParallelLinear": ("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads"),
    "MergedColumnParallelLinear": ("input_size", "output_sizes"),
    "RowParallelLinear": ("input_size", "output_size"),
}
_SHARED_LINEAR_ARGUMENTS = ("quant_config", "params_dtype", "prefix")
# The settings of a linear layer that our replacements implement.
_COLUMNS = {"skip_bias_add": False, "return_bias": True, "gather_output": False}
_ROWS = {"skip_bias_add": False, "return_bias": True, "input_is_parallel": True, "reduce_results": True}
_LINEAR_SETTINGS = {"QKVParallelLinear": _COLUMNS, "MergedColumnParallelLinear": _COLUMNS, "RowParallelLinear": _ROWS}


def version() -> str:
    """The version of vLLM."""
    import vllm

    return str(vllm.__version__)


def register(architecture: str, target: str) -> None:
    """Register a class, ``module:Class``, for models of an architecture."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, target)


def stock_class(architecture: str) -> type[Any]:
    """The class that vLLM itself has for an architecture."""
    module, name = ARCHITECTURES[architecture]
    try:
        stock: type[Any] = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise unknown_vllm(f"has no {name} in vllm.model_executor.models.{module}") from error
    return stock


def settings_of(vllm_config: Any) -> LlmParallelConfig | None:
    """Our settings in vLLM's configuration; None where vLLM runs as without us."""
    return LlmParallelConfig.from_additional_config(getattr(vllm_config, "additional_config", None))


def require_known_vllm() -> None:
    """Raise UnsupportedModelError where a function or group of vLLM that we use is missing or differs."""
    for module, name, parameters in _FUNCTIONS:
        found = getattr(importlib.import_module(module), name, None)
        if not callable(found):
            raise unknown_vllm(f"has no {module}.{name}")
        missing = [one for one in parameters if one not in inspect.signature(found).parameters]
        if missing:
            raise unknown_vllm(f"has no argument {missing[0]!r} of {module}.{name}")
    parallel_state = importlib.import_module(_PARALLEL)
    if not hasattr(parallel_state, "_TP"):
        raise unknown_vllm(f"has no {_PARALLEL}._TP")
    require_attributes(parallel_state.get_tp_group(), _GROUP_ATTRIBUTES, "its tensor parallel group")
    require_attributes(parallel_state.get_world_group(), ("local_rank",), "its group of all ranks")


def require_supported_config(
    vllm_config: Any, settings: LlmParallelConfig, *, what: str = "sequence parallelism"
) -> None:
    """Raise ConfigError for settings of vLLM with which results would be wrong, or silently not parallel.

    ``what`` does not run with them.
    """
    read = functools.partial(read_config, vllm_config)
    world = read("parallel_config.tensor_parallel_size")
    if world != settings.world_size:
        raise ConfigError(
            f"vLLM runs tensor_parallel_size={world}, and sequence × tensor parallel is "
            f"{settings.sequence_parallel_size} × {settings.tensor_parallel_size} = {settings.world_size}: let our "
            "flags, or omni_sp.llm.LLM, set it"
        )
    quantization, speculation = read("quant_config"), read("speculative_config")
    text = read("model_config.hf_text_config")
    EngineFeatures(
        enable_lora=read("lora_config") is not None,
        pipeline_parallel_size=read("parallel_config.pipeline_parallel_size"),
        data_parallel_size=read("parallel_config.data_parallel_size"),
        quantization=None if quantization is None else quantization.get_name(),
        speculation=None if speculation is None else read("speculative_config.method"),
        has_mrope=bool(read("model_config.uses_mrope")),
        has_dual_chunks=bool(getattr(text, "dual_chunk_attention_config", None)),
        attention_heads=text.num_attention_heads,
        runner=read("model_config.runner_type"),
        decode_context_parallel_size=read("parallel_config.decode_context_parallel_size"),
        prefill_context_parallel_size=read("parallel_config.prefill_context_parallel_size"),
        enable_dbo=read("parallel_config.use_ubatching"),
    ).require_supported(settings, what=what)
    if read("cache_config.kv_sharing_fast_prefill") and not settings.swiftkv:
        raise ConfigError(f"{what} does not run with kv_sharing_fast_prefill: leave it")
    require_eager_where_needed(vllm_config, settings)


def require_eager_where_needed(vllm_config: Any, settings: LlmParallelConfig) -> None:
    """Raise ConfigError where vLLM compiles the model and that cannot be right, or was not tried."""
    if not runs_compiled(vllm_config):
        return
    reason = settings.reason_for_eager(on_cpu=runs_on_cpu())
    if reason is not None:
        raise ConfigError(f"{reason}: add --enforce-eager (in Python enforce_eager=True)")
    mode = getattr(read_config(vllm_config, "compilation_config.mode"), "name", None)
    if mode not in _COMPILATION_MODES:
        raise ConfigError(
            f"beside our flags vLLM compiles by the modes {', '.join(_COMPILATION_MODES)}, not {mode}: leave the mode "
            "in --compilation-config, or add --enforce-eager (in Python enforce_eager=True)"
        )


def runs_compiled(vllm_config: Any) -> bool:
    """Whether vLLM compiles the model."""
    return not read_config(vllm_config, "model_config.enforce_eager")


def keep_out_of_compile_key(vllm_config: Any) -> None:
    """Let the next start find what this one compiles, though it counts its steps in another file.

    vLLM's key of its compile cache holds ``additional_config``. What counts has opened the file by now.
    """
    settings = settings_of(vllm_config)
    assert settings is not None, "a model over ranks has settings"
    entries = {**vllm_config.additional_config}
    del entries[CONFIG_KEY]
    vllm_config.additional_config = replace(settings, step_counts_file=None).additional_config(entries)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers; raises UnsupportedModelError where one lacks an attribute that we use."""
    name = type(model).__name__
    require_attributes(model, ("model",), name)
    require_attributes(model.model, ("layers", "embed_input_ids"), f"{name}.model")
    layers = list(model.model.layers)
    for layer in layers:
        name = type(layer).__name__
        require_attributes(layer, ("self_attn", "mlp"), name)
        require_attributes(layer.self_attn, (*_ATTENTION_ATTRIBUTES, "attn"), f"{name}.self_attn")
        require_attributes(layer.self_attn.attn, _KV_CACHE_ATTRIBUTES, f"{name}.self_attn.attn")
        require_attributes(layer.mlp, _MLP_ATTRIBUTES, f"{name}.mlp")
        if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
            raise UnsupportedModelError("layers with an adaptive norm (ada_rms_norm_t_cond) are not handled")
    return layers


def require_slots(layer_name: str, tokens: int) -> None:
    """Raise UnsupportedModelError unless the current step has exactly one slot in the KV cache for each token.

    A token too many would overwrite another request's keys and values. For a slot too many, vLLM's kernel would store
    whatever lies behind the tokens in memory.
    """
    from vllm.forward_context import get_forward_context

    slots = get_forward_context().slot_mapping
    if not isinstance(slots, dict):
        raise unknown_vllm(f"names the cache's places by a {type(slots).__name__}, not by layer")
    own = slots.get(layer_name)
    if own is not None and own.shape[0] != tokens:
        raise unknown_vllm(f"runs a step of {tokens} tokens with {own.shape[0]} places in the cache, not one for each")


def attention_layer(layer_name: str) -> Any:
    """The attention layer of the current step's model with this name."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer_name]


def read_config(vllm_config: Any, path: str) -> Any:
    """The value at a dotted path in vLLM's configuration."""
    for name in path.split("."):
        require_attributes(vllm_config, (name,), f"its configuration ({path})")
        vllm_config = getattr(vllm_config, name)
    return vllm_config


def require_attributes(owner: Any, attributes: Iterable[str], what: str) -> None:
    """Raise UnsupportedModelError where a part of vLLM, ``what``, lacks an attribute that we use."""
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise unknown_vllm(f"has no {attribute} in {what}")


def unknown_vllm(difference: str) -> UnsupportedModelError:
    """The error for a vLLM that differs from what we rely on; ``difference`` is what it does or lacks."""
    return UnsupportedModelError(
        f"vLLM {version()} {difference}, and omni-sp relies on that: use vLLM {TESTED}, which it is tested with"
    )


@dataclass(frozen=True)
class InnerRank:
    """This process's rank in one of our own tensor parallel groups, with the names that vLLM's layers read."""

    rank_in_group: int
    world_size: int


@contextlib.contextmanager
def layers_sharded_for(inner: InnerRank) -> Iterator[None]:
    """Layers that are constructed within hold the shards of this group, not of vLLM's own."""
    from vllm.distributed import parallel_state

    original = parallel_state._TP
    parallel_state._TP = inner
    try:
        yield
    finally:
        parallel_state._TP = original


def world_rank() -> int:
    """This process's rank in vLLM's tensor parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def broadcast_from_rank_0(value: Any) -> Any:
    """The value of rank 0 of vLLM's tensor parallel group, on every rank. A collective."""
    from vllm.distributed import parallel_state

    return parallel_state.get_tp_group().broadcast_object(value, src=0)


def runs_on_cpu() -> bool:
    """Whether this vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def max_step_tokens(vllm_config: Any) -> int:
    """The most tokens of a step."""
    return int(read_config(vllm_config, "scheduler_config.max_num_batched_tokens"))


def max_model_length(vllm_config: Any) -> int:
    """The most tokens of a request, prompt and answer together."""
    return int(read_config(vllm_config, "model_config.max_model_len"))


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reduce_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over vLLM's tensor parallel group."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    total: torch.Tensor = tensor_model_parallel_all_reduce(tensor)
    return total


def groups(settings: LlmParallelConfig) -> tuple[Axis, Any]:
    """The axis of ranks that share tokens, and the group of ranks that share weights (None where that is one rank).

    vLLM's rank r is t · S + s: its KV cache holds block r of all heads, however a step runs.
    """
    from vllm.distributed import parallel_state

    tp = parallel_state.get_tp_group()
    size, inner = settings.sequence_parallel_size, settings.tensor_parallel_size
    first = tp.ranks[0]
    sequence_groups = [[first + t * size + s for s in range(size)] for t in range(inner)]
    weight_groups = [[first + t * size + s for t in range(inner)] for s in range(size)]
    if inner == 1:
        return Axis.of_group(tp.device_group), None
    sequence, weights = (
        parallel_state.init_model_parallel_group(
            group_ranks=ranks,
            local_rank=parallel_state.get_world_group().local_rank,
            backend=torch.distributed.get_backend(tp.device_group),
            group_name=name,
        )
        for ranks, name in ((sequence_groups, "omni_sp_sequence"), (weight_groups, "omni_sp_weights"))
    )
    return Axis.of_group(sequence.device_group), weights


def clone_linear_for(stock: Any, kind: str, inner: InnerRank) -> Any:
    """A linear layer like a stock one of class ``kind`` that holds the shard of another group.

    Raises UnsupportedModelError where the stock layer is of another class, or has settings that we do not implement.
    """
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import linear as layers

    cls = getattr(layers, kind, None)
    if cls is None:
        raise unknown_vllm(f"has no {kind}")
    if type(stock) is not cls:
        raise UnsupportedModelError(f"a {type(stock).__name__} stands where a {kind} is expected")
    names = (*_LINEAR_ARGUMENTS[kind], *_SHARED_LINEAR_ARGUMENTS)
    require_attributes(stock, (*names, "bias", "tp_size", *_LINEAR_SETTINGS[kind]), kind)
    arguments = {name: getattr(stock, name) for name in names} | {"bias": stock.bias is not None}
    unknown = set(arguments) - set(inspect.signature(cls.__init__).parameters)
    if unknown:
        raise unknown_vllm(f"has no argument {min(unknown)!r} of {kind}")
    expected = _LINEAR_SETTINGS[kind] | {"tp_size": parallel_state.get_tp_group().world_size}
    if kind == "QKVParallelLinear":
        expected["v_head_size"] = stock.head_size
    for name, value in expected.items():
        if getattr(stock, name, value) != value:
            raise UnsupportedModelError(
                f"{stock.prefix} works with {name}={getattr(stock, name)!r}, and sequence parallelism handles "
                f"{value!r} alone: use tensor parallelism alone for this model"
            )
    with layers_sharded_for(inner):
        linear = cls(**arguments)
    require_attributes(linear, ("tp_rank", "tp_size", "quant_method"), kind)
    require_attributes(linear.quant_method, ("apply",), f"{kind}.quant_method")
    if (linear.tp_rank, linear.tp_size) != (inner.rank_in_group, inner.world_size):
        raise unknown_vllm(f"makes a {kind} for another group than {_PARALLEL}._TP")
    return linear


def is_unquantised(linear: Any) -> bool:
    """Whether a layer's matrix is multiplied as it was loaded."""
    return type(linear.quant_method).__name__ == "UnquantizedLinearMethod"


def describe_quantisation(linear: Any) -> str:
    """What a layer's weights become, for the log: --quantization fp8 stands for other names in newer versions."""
    kernel = getattr(linear.quant_method, "fp8_linear", None)
    by = "" if kernel is None else f" with {type(kernel).__name__}"
    return "not quantised" if is_unquantised(linear) else f"quantised by {type(linear.quant_method).__name__}{by}"


def keep_unpacked(linear: Any) -> None:
    """Keep a layer's matrix as it is loaded: vLLM's build for CPUs packs and drops it, and we use views of its rows."""
    linear.skip_weight_relayout = True  # 0.30
    linear._cpu_skip_gemm_dispatch = True  # 0.31 on


def require_unpacked(linear: Any) -> None:
    """Raise UnsupportedModelError where vLLM has packed or dropped the loaded matrix of a layer."""
    expected = linear.output_size_per_partition, linear.input_size_per_partition
    found = tuple(getattr(getattr(linear, "weight", None), "shape", ()))
    if found != expected:
        raise unknown_vllm(f"turned the matrix {linear.prefix}, {expected}, into {found or 'something else'}")
