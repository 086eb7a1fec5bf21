"""Everything that we rely on inside vLLM, in one place, each looked at before it is used.

Tested with the versions that ``TESTED`` names. What differs between them is told apart here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.vllm.config import EngineFeatures, LlmParallelConfig
from omni_sp.mesh import Axis

TESTED = "0.30 to 0.32"
"""The versions of vLLM that all of this is tested with."""

# Architecture -> vLLM's module and class. All are one decoder: q/k/v in one matrix, rotary embedding, gated MLP.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
}

_PARALLEL = "vllm.distributed.parallel_state"
# What we call, with the arguments that we give by name.
_CALLED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.distributed", "get_tensor_model_parallel_rank", ()),
    ("vllm.distributed", "tensor_model_parallel_all_reduce", ()),
    ("vllm.forward_context", "get_forward_context", ()),
    (_PARALLEL, "get_tp_group", ()),
    (_PARALLEL, "get_world_group", ()),
    (_PARALLEL, "init_model_parallel_group", ("group_ranks", "local_rank", "backend", "group_name")),
)
_GROUP_PARTS = ("ranks", "rank_in_group", "world_size", "device_group", "all_reduce", "broadcast_object")
_ATTENTION_PARTS = ("qkv_proj", "o_proj", "q_size", "kv_size", "num_heads", "num_kv_heads", "head_dim")
_MLP_PARTS = ("gate_up_proj", "down_proj")
_CACHED_PARTS = ("forward", "layer_name", "head_size", "num_heads", "num_kv_heads")
# What a linear layer is made with, and keeps by the same name.
_MADE_WITH = {
    "QKVParallelLinear": ("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads"),
    "MergedColumnParallelLinear": ("input_size", "output_sizes"),
    "RowParallelLinear": ("input_size", "output_size"),
}
_ALL_MADE_WITH = ("quant_config", "params_dtype", "prefix")
# How a linear layer works, which ours do likewise.
_COLUMNS = {"skip_bias_add": False, "return_bias": True, "gather_output": False}
_ROWS = {"skip_bias_add": False, "return_bias": True, "input_is_parallel": True, "reduce_results": True}
_WORKS = {"QKVParallelLinear": _COLUMNS, "MergedColumnParallelLinear": _COLUMNS, "RowParallelLinear": _ROWS}


def version() -> str:
    """The version of vLLM."""
    import vllm

    return str(vllm.__version__)


def register(architecture: str, target: str) -> None:
    """Let vLLM make models of an architecture by ``module:Class``."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, target)


def stock_class(architecture: str) -> type[Any]:
    """The class that vLLM itself has for it."""
    module, name = ARCHITECTURES[architecture]
    try:
        stock: type[Any] = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise _unknown(f"has no {name} in vllm.model_executor.models.{module}") from error
    return stock


def settings_of(vllm_config: Any) -> LlmParallelConfig | None:
    """What was asked of us; None for nothing."""
    return LlmParallelConfig.found_in(getattr(vllm_config, "additional_config", None))


def require_known() -> None:
    """Look at what is called of vLLM, apart from its layers.

    Raises:
        UnsupportedModelError: it is not as we know it; names what.
    """
    for module, name, parameters in _CALLED:
        found = getattr(importlib.import_module(module), name, None)
        if not callable(found):
            raise _unknown(f"has no {module}.{name}")
        missing = [one for one in parameters if one not in inspect.signature(found).parameters]
        if missing:
            raise _unknown(f"has no argument {missing[0]!r} of {module}.{name}")
    parallel_state = importlib.import_module(_PARALLEL)
    if not hasattr(parallel_state, "_TP"):
        raise _unknown(f"has no {_PARALLEL}._TP")
    _require(parallel_state.get_tp_group(), _GROUP_PARTS, "its tensor parallel group")
    _require(parallel_state.get_world_group(), ("local_rank",), "its group of all ranks")


def refuse_what_is_not_handled(vllm_config: Any, settings: LlmParallelConfig) -> None:
    """Raise for what would be wrong, or silently not parallel, with a way out.

    Raises:
        ConfigError: by name. UnsupportedModelError: vLLM's configuration is not as we know it.
    """
    read = functools.partial(_read_config, vllm_config)
    world = read("parallel_config.tensor_parallel_size")
    if world != settings.world_size:
        raise ConfigError(
            f"vLLM runs tensor_parallel_size={world}, and sequence × tensor parallel is "
            f"{settings.sequence_parallel_size} × {settings.tensor_parallel_size} = {settings.world_size}: let our "
            "flags, or omni_sp.llm.LLM, set it"
        )
    quantised, speculation = read("quant_config"), read("speculative_config")
    EngineFeatures(
        enable_lora=read("lora_config") is not None,
        pipeline_parallel_size=read("parallel_config.pipeline_parallel_size"),
        data_parallel_size=read("parallel_config.data_parallel_size"),
        quantization=None if quantised is None else quantised.get_name(),
        speculation=None if speculation is None else read("speculative_config.method"),
        has_mrope=bool(read("model_config.uses_mrope")),
        attention_heads=read("model_config.hf_text_config").num_attention_heads,
    ).require_handled(settings)
    runner = read("model_config.runner_type")
    if runner != "generate":
        raise ConfigError(f"sequence parallelism inside vLLM generates text, and this runs for {runner!r}")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if read(f"parallel_config.{name}") > 1:
            raise ConfigError(f"sequence parallelism does not run with vLLM's context parallelism: leave {name}")
    if read("parallel_config.use_ubatching"):
        raise ConfigError("sequence parallelism does not run with microbatches: leave --enable-dbo and --ubatch-size")
    if read("cache_config.kv_sharing_fast_prefill"):
        raise ConfigError("sequence parallelism does not run with kv_sharing_fast_prefill: leave it")
    if not read("model_config.enforce_eager"):
        raise ConfigError(
            "sequence parallelism runs eagerly for now: add --enforce-eager (in Python enforce_eager=True)"
        )


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers, each looked at.

    Raises:
        UnsupportedModelError: they are not built as we rely on; names what is missing.
    """
    name = type(model).__name__
    _require(model, ("model",), name)
    _require(model.model, ("layers", "embed_input_ids"), f"{name}.model")
    layers = list(model.model.layers)
    for layer in layers:
        name = type(layer).__name__
        _require(layer, ("self_attn", "mlp"), name)
        _require(layer.self_attn, (*_ATTENTION_PARTS, "attn"), f"{name}.self_attn")
        _require(layer.self_attn.attn, _CACHED_PARTS, f"{name}.self_attn.attn")
        _require(layer.mlp, _MLP_PARTS, f"{name}.mlp")
        if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
            raise UnsupportedModelError("layers with an adaptive norm (ada_rms_norm_t_cond) are not handled")
    return layers


def require_slots(layer_name: str, rows: int) -> None:
    """Look whether the step under way has a place in the cache for each row, and no more.

    A row too many overwrites what is somebody's; where one is missing, what lies behind it in memory is kept.

    Raises:
        UnsupportedModelError: it has not.
    """
    from vllm.forward_context import get_forward_context

    slots = get_forward_context().slot_mapping
    if not isinstance(slots, dict):
        raise _unknown(f"names the cache's places by a {type(slots).__name__}, not by layer")
    own = slots.get(layer_name)
    if own is not None and own.shape[0] != rows:
        raise _unknown(f"runs a step of {rows} tokens with {own.shape[0]} places in the cache, not one for each")


def _read_config(vllm_config: Any, path: str) -> Any:
    """What a configuration says under a name."""
    for name in path.split("."):
        _require(vllm_config, (name,), f"its configuration ({path})")
        vllm_config = getattr(vllm_config, name)
    return vllm_config


def _require(owner: Any, parts: Iterable[str], what: str) -> None:
    for part in parts:
        if not hasattr(owner, part):
            raise _unknown(f"has no {part} in {what}")


def _unknown(difference: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"vLLM {version()} {difference}, and sequence parallelism relies on that: use vLLM {TESTED}, which it is "
        "tested with"
    )


@dataclass(frozen=True)
class InnerRank:
    """This process's place in a tensor parallel group of our own, as vLLM's layers ask for it while they are made."""

    rank_in_group: int
    world_size: int


@contextlib.contextmanager
def layers_sharded_for(inner: InnerRank) -> Iterator[None]:
    """Layers that are made within hold the shares of this group, not of vLLM's own."""
    from vllm.distributed import parallel_state

    before = parallel_state._TP
    parallel_state._TP = inner
    try:
        yield
    finally:
        parallel_state._TP = before


def world_rank() -> int:
    """This process's rank in vLLM's tensor parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def broadcast_from_rank_0(value: Any) -> Any:
    """What rank 0 of vLLM's tensor parallel group gave, on every rank. A collective."""
    from vllm.distributed import parallel_state

    return parallel_state.get_tp_group().broadcast_object(value, src=0)


def runs_on_cpu() -> bool:
    """Whether this vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def max_step_tokens(vllm_config: Any) -> int:
    """The most tokens of a step."""
    return int(_read_config(vllm_config, "scheduler_config.max_num_batched_tokens"))


def synchronize(device: torch.device) -> None:
    """Wait for what a device has yet to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reduce_over_world(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over vLLM's tensor parallel group."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    total: torch.Tensor = tensor_model_parallel_all_reduce(tensor)
    return total


def groups(settings: LlmParallelConfig) -> tuple[Axis, Any]:
    """The axis of ranks that share tokens, and the group of those that share weights (None for one rank).

    Rank r of vLLM's is t · S + s: the heads that it keeps in its cache are block r of all heads, however a step runs.
    """
    from vllm.distributed import parallel_state

    tp = parallel_state.get_tp_group()
    size, inner = settings.sequence_parallel_size, settings.tensor_parallel_size
    first = tp.ranks[0]
    rows = [[first + t * size + s for s in range(size)] for t in range(inner)]
    columns = [[first + t * size + s for t in range(inner)] for s in range(size)]
    if inner == 1:
        return Axis.of_group(tp.device_group), None
    row, column = (
        parallel_state.init_model_parallel_group(
            group_ranks=ranks,
            local_rank=parallel_state.get_world_group().local_rank,
            backend=torch.distributed.get_backend(tp.device_group),
            group_name=name,
        )
        for ranks, name in ((rows, "omni_sp_sequence"), (columns, "omni_sp_weights"))
    )
    return Axis.of_group(row.device_group), column


def clone_linear_for(stock: Any, kind: str, inner: InnerRank) -> Any:
    """A linear layer like a stock one, that holds the share of another group.

    Raises:
        UnsupportedModelError: the stock one is another layer, or works otherwise than we know.
    """
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import linear as layers

    cls = getattr(layers, kind, None)
    if cls is None:
        raise _unknown(f"has no {kind}")
    if type(stock) is not cls:
        raise UnsupportedModelError(f"a {type(stock).__name__} stands where a {kind} is expected")
    names = (*_MADE_WITH[kind], *_ALL_MADE_WITH)
    _require(stock, (*names, "bias", "tp_size", *_WORKS[kind]), kind)
    arguments = {name: getattr(stock, name) for name in names} | {"bias": stock.bias is not None}
    unknown = set(arguments) - set(inspect.signature(cls.__init__).parameters)
    if unknown:
        raise _unknown(f"has no argument {min(unknown)!r} of {kind}")
    works = _WORKS[kind] | {"tp_size": parallel_state.get_tp_group().world_size}
    if kind == "QKVParallelLinear":
        works["v_head_size"] = stock.head_size
    for name, value in works.items():
        if getattr(stock, name, value) != value:
            raise UnsupportedModelError(
                f"{stock.prefix} works with {name}={getattr(stock, name)!r}, and sequence parallelism handles "
                f"{value!r} alone: use tensor parallelism alone for this model"
            )
    with layers_sharded_for(inner):
        linear = cls(**arguments)
    _require(linear, ("tp_rank", "tp_size", "quant_method"), kind)
    _require(linear.quant_method, ("apply",), f"{kind}.quant_method")
    if (linear.tp_rank, linear.tp_size) != (inner.rank_in_group, inner.world_size):
        raise _unknown(f"makes a {kind} for another group than {_PARALLEL}._TP")
    return linear


def keep_unpacked(linear: Any) -> None:
    """Let a layer's matrix stay as it is: vLLM's build for CPUs packs it and drops it, and we look at parts of it."""
    linear.skip_weight_relayout = True  # 0.30
    linear._cpu_skip_gemm_dispatch = True  # 0.31 on


def require_unpacked(linear: Any) -> None:
    """Look whether the matrix of a layer, now loaded, is still there as it was.

    Raises:
        UnsupportedModelError: it is not.
    """
    expected = linear.output_size_per_partition, linear.input_size_per_partition
    found = tuple(getattr(getattr(linear, "weight", None), "shape", ()))
    if found != expected:
        raise _unknown(f"turned the matrix {linear.prefix}, {expected}, into {found or 'something else'}")
