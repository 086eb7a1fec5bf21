"""SwiftKV inside vLLM (arXiv 2410.03960): the late layers are computed for tokens that something is sampled after.

The keys and values of all late layers come from the hidden state before the first of them. So the tokens of a prompt
pass through the early layers alone, of which the ranks may share tokens or heads as of any model
(`omni_sp.llm.vllm.shift_parallel`). The late layers are by tensor parallelism over all ranks, as vLLM makes them: each
rank has its heads' keys and values of all tokens, as in the early layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from omni_sp.errors import ConfigError
from omni_sp.llm.swiftkv import ARCHITECTURES, kv_sharing
from omni_sp.llm.swiftkv import config as configs
from omni_sp.llm.vllm import internals
from omni_sp.llm.vllm.models import sequence_parallel_class
from omni_sp.llm.vllm.step_metrics import StepCounter

_OWN_WEIGHT = re.compile(r"(.*\.self_attn\.)([qkv])_proj_swiftkv\.(.+)")
_STOCK_WEIGHT = re.compile(r".*\.layers\.(\d+)\.self_attn\.(?:([qkv])_proj|k_norm)\.")


def swiftkv_class(architecture: str) -> Any:
    """The class for vLLM's registry, derived from that of the model without SwiftKV."""
    base = sequence_parallel_class(ARCHITECTURES[architecture])

    class SwiftKVModel(base):  # type: ignore[valid-type, misc]  # known when it runs
        """A decoder whose late layers share one hidden state for keys and values."""

        packed_modules_mapping: ClassVar = {
            **base.packed_modules_mapping,
            "kv_proj_swiftkv": ["k_proj_swiftkv", "v_proj_swiftkv"],
        }

        def __init__(self, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
            settings = kv_sharing.require_supported(vllm_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
            first, group = configs.late_layers(self.config)
            self._early = _EarlyLayers(self.model, first)
            self._late = _LateLayers(self.model, first, group, vllm_config, settings.step_counts_file)

        def _layers_over_ranks(self) -> list[Any]:
            first, _ = configs.late_layers(self.config)
            early: list[Any] = super()._layers_over_ranks()[:first]
            return early

        def _run_step(self, input_ids: Any, positions: Any, intermediate_tensors: Any, inputs_embeds: Any) -> Any:
            """The last hidden states of tokens that something is sampled after; other rows have no meaning."""
            assert intermediate_tensors is None, "pipeline parallelism was refused"
            if self._shift_parallel is None:
                hidden = self._early(input_ids, positions, None, inputs_embeds)
            else:
                hidden = self._shift_parallel.run(self._early, input_ids, positions, inputs_embeds)
            return self._late.run(hidden, positions)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """Load a file with or without the matrices that the late layers had before."""
            parameters = dict(self.named_parameters())
            own: set[tuple[str, str]] = set()
            others: set[str] = super().load_weights(self._late.take_own(weights, parameters, own))
            own |= {(name, "norm") for name in others if "norm_swiftkv." in name}
            missing = {(name, which) for name in parameters for which in _shards_of(name)} - own
            if missing:
                name, which = min(missing)
                raise ConfigError(
                    f"the model's files lack {len(missing)} weights of SwiftKV; the first is {which} of {name}"
                )
            return others | {name for name, _ in own}

    SwiftKVModel.__name__ = SwiftKVModel.__qualname__ = architecture
    return SwiftKVModel


class _EarlyLayers:
    """The layers before the shared hidden state, called as vLLM's whole decoder is."""

    def __init__(self, decoder: Any, first: int) -> None:
        self._layers = list(decoder.layers)[:first]
        self.embed_input_ids = decoder.embed_input_ids

    def __call__(self, input_ids: Any, positions: Tensor, _intermediate: None, inputs_embeds: Any) -> Tensor:
        """The residual stream after the last of them: one tensor to gather."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self._layers:
            hidden, residual = layer(positions, hidden, residual)
        total: Tensor = hidden + residual
        return total


class _LateLayers:
    """The layers after the shared hidden state, whose attention it replaces before their weights are loaded."""

    def __init__(self, decoder: Any, first: int, group: int, vllm_config: Any, counts_file: str | None) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm

        self._first, self._group, self._decoder = first, group, decoder
        self._layers = list(decoder.layers)[first:]
        self._counter = StepCounter.open(counts_file) if internals.world_rank() == 0 else None
        config = decoder.config
        decoder.norm_swiftkv = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for index, layer in enumerate(self._layers):
            self._replace_projections(layer.self_attn, vllm_config, makes_keys=index % group == 0)
        self._writers = [layer.self_attn.writer for layer in self._layers[::group]]
        for index, layer in enumerate(self._layers):
            attention, writer = layer.self_attn, self._writers[index // group]
            name = f"{_prefix_of(attention)}.reader"
            attention.attn = kv_sharing.reader_of(writer, name, attention.scaling, vllm_config)
        self._are_scales_known = False

    def _replace_projections(self, attention: Any, vllm_config: Any, *, makes_keys: bool) -> None:
        from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

        stock, prefix = attention.qkv_proj, _prefix_of(attention)
        kind = {"bias": stock.bias is not None, "quant_config": vllm_config.quant_config}
        width = attention.total_num_heads * attention.head_dim
        attention.q_proj_swiftkv = ColumnParallelLinear(
            stock.hidden_size, width, **kind, gather_output=False, prefix=f"{prefix}.q_proj_swiftkv"
        )
        attention.writer = None
        if makes_keys:
            kv_sharing.require_writer(attention.attn)
            attention.writer = attention.attn
            attention.kv_proj_swiftkv = QKVParallelLinear(
                stock.hidden_size, attention.head_dim, 0, attention.total_num_kv_heads,
                **kind, prefix=f"{prefix}.kv_proj_swiftkv",
            )  # fmt: skip
        else:
            kv_sharing.forget_layer(vllm_config, attention.attn)
            if hasattr(attention, "k_norm"):
                attention.k_norm = None
        attention.qkv_proj = None

    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Store the keys and values of all tokens, and compute the layers for those that something is sampled after.

        Args:
            hidden: (tokens, hidden size) before the first of the layers, whole on every rank.
            positions: (tokens,)
        """
        count = hidden.shape[0]
        internals.require_slots(self._writers[0].layer_name, count)
        if not self._are_scales_known:
            for index, layer in enumerate(self._layers):
                kv_sharing.require_same_scales(self._writers[index // self._group], layer.self_attn.attn)
            self._are_scales_known = True
        shared = self._decoder.norm_swiftkv(hidden)
        for layer, writer in zip(self._layers[:: self._group], self._writers, strict=True):
            _store_keys(layer.self_attn, writer, shared, positions)
        is_step, rows = kv_sharing.sampled_rows(self._layers[-1].self_attn.attn.layer_name)
        out = hidden
        if rows is not None:
            hidden, positions = hidden[rows], positions[rows]
        if is_step and self._counter is not None:
            self._counter.add_swiftkv(early_tokens=count, late_tokens=hidden.shape[0])
        residual: Tensor | None = None
        for layer in self._layers:
            if residual is None:
                hidden, residual = layer.input_layernorm(hidden), hidden
            else:
                hidden, residual = layer.input_layernorm(hidden, residual)
            hidden = _attend(layer.self_attn, hidden, positions)
            hidden, residual = layer.post_attention_layernorm(hidden, residual)
            hidden = layer.mlp(hidden)
        last: Tensor = self._decoder.norm(hidden, residual)[0]
        if rows is None:
            return last
        out[rows] = last
        return out

    def take_own(
        self, weights: Iterable[tuple[str, Tensor]], parameters: dict[str, Any], loaded: set[tuple[str, str]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Load the weights of SwiftKV, pass over those that it replaces, and yield the others."""
        for name, weight in weights:
            own, stock = _OWN_WEIGHT.fullmatch(name), _STOCK_WEIGHT.match(name)
            if own is not None:
                owner, which, rest = own.groups()
                target = f"{owner}{'q' if which == 'q' else 'kv'}_proj_swiftkv.{rest}"
                if target not in parameters:
                    raise ConfigError(f"the model's files hold {name}, for which its config.json leaves no place")
                shard = () if which == "q" else (which,)
                parameters[target].weight_loader(parameters[target], weight, *shard)
                loaded.add((target, which))
            elif stock is None or not self._is_replaced(int(stock[1]), stock[2]):
                yield name, weight

    def _is_replaced(self, layer: int, matrix: str | None) -> bool:
        """Whether a late layer has no such matrix; ``matrix`` None: no norm of keys."""
        late = layer - self._first
        return late >= 0 and (matrix is not None or late % self._group != 0)


def _shards_of(name: str) -> Sequence[str]:
    """What of SwiftKV's weights a parameter holds."""
    kinds = {"kv_proj_swiftkv": "kv", "q_proj_swiftkv": "q", "norm_swiftkv": ("norm",)}
    return next((kinds[part] for part in name.split(".") if part in kinds), "")


def _prefix_of(attention: Any) -> str:
    """The name of an attention module, "model.layers.3.self_attn"."""
    return str(attention.o_proj.prefix).rpartition(".")[0]


def _store_keys(attention: Any, writer: Any, shared: Tensor, positions: Tensor) -> None:
    projected, _ = attention.kv_proj_swiftkv(shared)
    key, value = projected.chunk(2, dim=-1)
    kv_sharing.store(writer, _rotate(attention, key, "k_norm", positions), value)


def _attend(attention: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    query, _ = attention.q_proj_swiftkv(hidden)
    out, _ = attention.o_proj(attention.attn(_rotate(attention, query, "q_norm", positions), None, None))
    projected: Tensor = out
    return projected


def _rotate(attention: Any, heads: Tensor, norm: str, positions: Tensor) -> Tensor:
    """Queries or keys, (tokens, heads x head_dim), at their positions; each head normalised before it in Qwen3."""
    if getattr(attention, norm, None) is not None:
        split = heads.unflatten(-1, (-1, attention.head_dim))
        heads = getattr(attention, norm)(split.contiguous()).flatten(-2)
    # Not every kernel rotates one tensor alone, so it gets one head of zeros beside it.
    beside = torch.zeros_like(heads[:, : attention.head_dim])
    rotated: Tensor = attention.rotary_emb(positions, heads.contiguous(), beside)[0]
    return rotated


LlamaSwiftKVForCausalLM = swiftkv_class("LlamaSwiftKVForCausalLM")
Qwen2SwiftKVForCausalLM = swiftkv_class("Qwen2SwiftKVForCausalLM")
Qwen3SwiftKVForCausalLM = swiftkv_class("Qwen3SwiftKVForCausalLM")
