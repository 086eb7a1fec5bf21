"""SwiftKV models (arXiv 2410.03960) in plain transformers: every token passes through every layer.

For training, for tests, and for `omni_sp.llm.parallelize`. Inside vLLM the tokens of a prompt leave before the late
layers; the answers are the same.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from omni_sp.llm.swiftkv import config as configs

NAMES = ("Llama", "Qwen2", "Qwen3")
"""The models that there are SwiftKV models of."""


class _Shared:
    """What the late layers of one forward share: the normalised hidden state, and keys and values of the current group.

    Keys and values are (batch, heads, tokens, head_dim), those of earlier calls in the cache included.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.hidden: Any = None
        self.keys: Any = None
        self.values: Any = None


def _classes(name: str) -> tuple[Any, Any]:
    """The base model and the model with its head, derived from transformers' own."""
    modeling = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    stock_attention: Any = getattr(modeling, f"{name}Attention")
    stock_layer: Any = getattr(modeling, f"{name}DecoderLayer")
    stock_model: Any = getattr(modeling, f"{name}Model")
    stock_head: Any = getattr(modeling, f"{name}ForCausalLM")
    make_norm: Any = getattr(modeling, f"{name}RMSNorm")
    own_config = getattr(configs, f"{name}SwiftKVConfig")

    class LateAttention(stock_attention):  # type: ignore[misc]  # known when it runs
        """Attention whose keys and values come from the shared hidden state; the first layer of a group makes them."""

        def __init__(self, config: Any, layer_idx: int, *, makes_keys: bool) -> None:
            super().__init__(config, layer_idx)
            self.q_proj_swiftkv, self.k_proj_swiftkv, self.v_proj_swiftkv = self.q_proj, self.k_proj, self.v_proj
            del self.q_proj, self.k_proj, self.v_proj
            self.makes_keys = makes_keys
            if not makes_keys:
                del self.k_proj_swiftkv, self.v_proj_swiftkv
                self._modules.pop("k_norm", None)  # of a Qwen3

        def forward(
            self,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Tensor | None = None,
            past_key_values: Any = None,
            *,
            swiftkv: _Shared,
            **more: Any,
        ) -> tuple[Tensor, Tensor | None]:
            """As transformers' own, but for where keys and values come from."""
            cos, sin = position_embeddings
            query = self._heads(self.q_proj_swiftkv(hidden_states), "q_norm")
            if self.makes_keys:
                key = self._heads(self.k_proj_swiftkv(swiftkv.hidden), "k_norm")
                value = self._heads(self.v_proj_swiftkv(swiftkv.hidden), "")
                query, key = modeling.apply_rotary_pos_emb(query, key, cos, sin)
                if past_key_values is not None:
                    key, value = past_key_values.update(key, value, self.layer_idx)
                swiftkv.keys, swiftkv.values = key, value
            else:
                query, _ = modeling.apply_rotary_pos_emb(query, query, cos, sin)
            attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, modeling.eager_attention_forward
            )
            dropout = self.attention_dropout if self.training else 0.0
            out, weights = attend(
                self, query, swiftkv.keys, swiftkv.values, attention_mask,
                dropout=dropout, scaling=self.scaling, **more,
            )  # fmt: skip
            return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

        def _heads(self, projected: Tensor, norm: str) -> Tensor:
            """(batch, tokens, heads x head_dim) as (batch, heads, tokens, head_dim), each head normalised in Qwen3."""
            heads = projected.unflatten(-1, (-1, self.head_dim))
            normalised: Tensor = getattr(self, norm)(heads) if hasattr(self, norm) else heads
            return normalised.transpose(1, 2)

    class EarlyLayer(stock_layer):  # type: ignore[misc]  # known when it runs
        """transformers' own layer."""

        def forward(self, *arguments: Any, swiftkv: _Shared, **named: Any) -> Any:  # noqa: ARG002
            """Run the layer, which shares nothing."""
            return super().forward(*arguments, **named)

    class LateLayer(stock_layer):  # type: ignore[misc]  # known when it runs
        """A layer of which the first one normalises the hidden state that all share."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            first, group = configs.late_layers(config)
            self.self_attn = LateAttention(config, layer_idx, makes_keys=(layer_idx - first) % group == 0)

        def forward(self, hidden_states: Tensor, *arguments: Any, swiftkv: _Shared, **named: Any) -> Any:
            """Run the layer."""
            if swiftkv.hidden is None:
                swiftkv.hidden = swiftkv.norm(hidden_states)
            return super().forward(hidden_states, *arguments, swiftkv=swiftkv, **named)

    class SwiftKVModel(stock_model):  # type: ignore[misc]  # known when it runs
        """The model without its head."""

        config_class = own_config
        # A file may hold the matrices that late layers had before. Those of early layers are never unexpected.
        _keys_to_ignore_on_load_unexpected = (r"self_attn\.(q|k|v)_proj\.", r"self_attn\.k_norm\.")

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            first, _ = configs.late_layers(config)
            self.layers = nn.ModuleList(
                (EarlyLayer if index < first else LateLayer)(config, index) for index in range(config.num_hidden_layers)
            )
            self.norm_swiftkv = make_norm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_init()

        def forward(self, *arguments: Any, **named: Any) -> Any:
            """As transformers' own."""
            return super().forward(*arguments, swiftkv=_Shared(self.norm_swiftkv), **named)

    class SwiftKVForCausalLM(stock_head):  # type: ignore[misc]  # known when it runs
        """The model with its head."""

        config_class = own_config
        _keys_to_ignore_on_load_unexpected = SwiftKVModel._keys_to_ignore_on_load_unexpected

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = SwiftKVModel(config)
            self.post_init()

    for cls, suffix in ((SwiftKVModel, "Model"), (SwiftKVForCausalLM, "ForCausalLM")):
        cls.__name__ = cls.__qualname__ = f"{name}SwiftKV{suffix}"
    return SwiftKVModel, SwiftKVForCausalLM


LlamaSwiftKVModel, LlamaSwiftKVForCausalLM = _classes("Llama")
Qwen2SwiftKVModel, Qwen2SwiftKVForCausalLM = _classes("Qwen2")
Qwen3SwiftKVModel, Qwen3SwiftKVForCausalLM = _classes("Qwen3")
