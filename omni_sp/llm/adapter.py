"""Everything that we rely on inside vLLM, in one place, each looked at before it is used.

Tested with vLLM 0.32. What differs between versions is told apart here and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.llm.settings import LlmParallelConfig, Wishes
from omni_sp.mesh import Axis, backends_of
from omni_sp.shared_memory import Outbox

# Architecture -> vLLM's module and class. All are one decoder: q/k/v in one matrix, rotary embedding, gated MLP.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
}

_ATTENTION_PARTS = ("qkv_proj", "o_proj", "attn", "q_size", "kv_size", "num_heads", "num_kv_heads", "head_dim")
_MLP_PARTS = ("gate_up_proj", "down_proj")


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
    stock: type[Any] = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return stock


def settings_of(vllm_config: Any) -> LlmParallelConfig | None:
    """What was asked of us; None for nothing."""
    return LlmParallelConfig.found_in(vllm_config.additional_config)


def refuse_what_is_not_handled(vllm_config: Any, settings: LlmParallelConfig) -> None:
    """Raise for what would be wrong, or silently not parallel, with a way out.

    Raises:
        ConfigError: by name.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    world = parallel.tensor_parallel_size
    if world != settings.world_size:
        raise ConfigError(
            f"vLLM runs tensor_parallel_size={world}, and sequence × tensor parallel is "
            f"{settings.sequence_parallel_size} × {settings.tensor_parallel_size} = {settings.world_size}: let our "
            "flags, or omni_sp.llm.LLM, set it"
        )
    quantised, speculation = vllm_config.quant_config, vllm_config.speculative_config
    Wishes(
        enable_lora=vllm_config.lora_config is not None,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        quantization=None if quantised is None else quantised.get_name(),
        speculation=None if speculation is None else speculation.method,
        has_mrope=bool(getattr(model, "uses_mrope", False)),
        attention_heads=model.hf_text_config.num_attention_heads,
    ).require_handled(settings)
    if model.runner_type != "generate":
        raise ConfigError(f"sequence parallelism inside vLLM generates text, and this runs for {model.runner_type!r}")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError("sequence parallelism does not run with kv_sharing_fast_prefill: leave it")
    if not model.enforce_eager:
        raise ConfigError(
            "sequence parallelism runs eagerly for now: add --enforce-eager (in Python enforce_eager=True)"
        )


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers, each looked at.

    Raises:
        UnsupportedModelError: they are not built as we rely on; names what is missing.
    """
    layers = list(model.model.layers)
    for layer in layers:
        for owner, parts in (("self_attn", _ATTENTION_PARTS), ("mlp", _MLP_PARTS)):
            missing = [part for part in parts if not hasattr(getattr(layer, owner, None), part)]
            if missing:
                raise UnsupportedModelError(
                    f"{type(layer).__name__} of vLLM {version()} has no {owner}.{missing[0]}, which sequence "
                    "parallelism relies on: use a version that it is tested with (0.32)"
                )
        if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
            raise UnsupportedModelError("layers with an adaptive norm (ada_rms_norm_t_cond) are not handled")
    return layers


@dataclass(frozen=True)
class InnerRank:
    """This process's place in a tensor parallel group of our own, as vLLM's layers ask for it while they are made."""

    rank_in_group: int
    world_size: int


@contextlib.contextmanager
def making_layers_for(inner: InnerRank) -> Iterator[None]:
    """Layers that are made within hold the shares of this group, not of vLLM's own."""
    from vllm.distributed import parallel_state

    if not hasattr(parallel_state, "_TP"):
        raise UnsupportedModelError(f"vLLM {version()} keeps its tensor parallel group elsewhere: use 0.32")
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


def as_rank_0(value: Any) -> Any:
    """What rank 0 of vLLM's tensor parallel group gave, on every rank. A collective."""
    from vllm.distributed import parallel_state

    return parallel_state.get_tp_group().broadcast_object(value, src=0)


def most_tokens(vllm_config: Any) -> int:
    """The most tokens of a step."""
    return int(vllm_config.scheduler_config.max_num_batched_tokens)


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
        return _axis(tp), None
    row, column = (
        parallel_state.init_model_parallel_group(
            ranks,
            parallel_state.get_world_group().local_rank,
            torch.distributed.get_backend(tp.device_group),
            group_name=name,
        )
        for ranks, name in ((rows, "omni_sp_sequence"), (columns, "omni_sp_weights"))
    )
    return _axis(row), column


def _axis(group: Any) -> Axis:
    """One of vLLM's groups as a row of ranks of ours."""
    process_group = group.device_group
    backends = backends_of(process_group)
    outbox = Outbox.open(process_group) if backends.get("cpu") == "gloo" else None
    return Axis("ulysses", tuple(group.ranks), group.rank_in_group, process_group, backends, outbox)


def qkv_linear(stock: Any) -> dict[str, Any]:
    """The arguments that a QKVParallelLinear was made with."""
    return {
        "hidden_size": stock.hidden_size,
        "head_size": stock.head_size,
        "total_num_heads": stock.total_num_heads,
        "total_num_kv_heads": stock.total_num_kv_heads,
        **_linear(stock),
    }


def merged_linear(stock: Any) -> dict[str, Any]:
    """The arguments that a MergedColumnParallelLinear was made with."""
    return {"input_size": stock.input_size, "output_sizes": list(stock.output_sizes), **_linear(stock)}


def row_linear(stock: Any) -> dict[str, Any]:
    """The arguments that a RowParallelLinear was made with."""
    return {"input_size": stock.input_size, "output_size": stock.output_size, **_linear(stock)}


def _linear(stock: Any) -> dict[str, Any]:
    return {
        "bias": stock.bias is not None,
        "quant_config": stock.quant_config,
        "params_dtype": stock.params_dtype,
        "prefix": stock.prefix,
    }


def keep_weight(linear: Any) -> None:
    """Let a layer's matrix stay as it is: vLLM's build for CPUs packs it and drops it, and we look at parts of it."""
    linear.skip_weight_relayout = True  # 0.30
    linear._cpu_skip_gemm_dispatch = True  # 0.31 on


def require_stock(linear: Any, name: str) -> None:
    """Refuse a layer that somebody has exchanged for another."""
    from vllm.model_executor.layers import linear as layers

    expected = getattr(layers, name)
    if type(linear) is not expected:
        raise UnsupportedModelError(f"a {type(linear).__name__} stands where a {name} is expected")
    if not {"disable_tp"} <= set(inspect.signature(expected.__init__).parameters):
        raise UnsupportedModelError(f"{name} of vLLM {version()} is not as we know it: use 0.32")
