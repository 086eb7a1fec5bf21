"""SwiftKV models (arXiv 2410.03960) in plain transformers: every token passes through every layer.

For training, for tests, and for `omni_sp.llm.parallelize`. Inside vLLM the tokens of a prompt leave before the late
layers; the answers are the same.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

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


# What follows is written once for all models, and stands before one's own classes of transformers. For the type checker
# these classes may have any attribute; the ones that they use are those of that second class.
_Stock: Any = object


class _LateAttention(_Stock):  # type: ignore[misc]
    """Attention whose keys and values come from the shared hidden state; the first layer of a group makes them."""

    modeling: ClassVar[Any]
    """The module of transformers that the second class is from."""

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
        rotate = self.modeling.apply_rotary_pos_emb
        query = self._heads(self.q_proj_swiftkv(hidden_states), "q_norm")
        if self.makes_keys:
            key = self._heads(self.k_proj_swiftkv(swiftkv.hidden), "k_norm")
            value = self._heads(self.v_proj_swiftkv(swiftkv.hidden), "")
            query, key = rotate(query, key, *position_embeddings)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
            swiftkv.keys, swiftkv.values = key, value
        else:
            query, _ = rotate(query, query, *position_embeddings)
        attend = self.modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.modeling.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, swiftkv.keys, swiftkv.values, attention_mask, dropout=dropout, scaling=self.scaling, **more
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _heads(self, projected: Tensor, norm: str) -> Tensor:
        """(batch, tokens, heads x head_dim) as (batch, heads, tokens, head_dim), each head normalised in Qwen3."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        normalised: Tensor = getattr(self, norm)(heads) if hasattr(self, norm) else heads
        return normalised.transpose(1, 2)


class _EarlyLayer(_Stock):  # type: ignore[misc]
    """transformers' own layer."""

    def forward(self, *arguments: Any, swiftkv: _Shared, **named: Any) -> Any:  # noqa: ARG002
        """Run the layer, which shares nothing."""
        return super().forward(*arguments, **named)


class _LateLayer(_Stock):  # type: ignore[misc]
    """A layer of which the first one normalises the hidden state that all share."""

    attention_class: ClassVar[Any]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        first, group = configs.late_layers(config)
        self.self_attn = self.attention_class(config, layer_idx, makes_keys=(layer_idx - first) % group == 0)

    def forward(self, hidden_states: Tensor, *arguments: Any, swiftkv: _Shared, **named: Any) -> Any:
        """Run the layer."""
        if swiftkv.hidden is None:
            swiftkv.hidden = swiftkv.norm(hidden_states)
        return super().forward(hidden_states, *arguments, swiftkv=swiftkv, **named)


class _Model(_Stock):  # type: ignore[misc]
    """The model without its head."""

    # A file may hold the matrices that late layers had before. Those of early layers are never unexpected.
    _keys_to_ignore_on_load_unexpected = (r"self_attn\.(q|k|v)_proj\.", r"self_attn\.k_norm\.")
    layer_classes: ClassVar[tuple[Any, Any]]
    """Of an early layer, and of a late one."""
    norm_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first, _ = configs.late_layers(config)
        early, late = self.layer_classes
        self.layers = nn.ModuleList(
            (early if index < first else late)(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm_swiftkv = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As transformers' own."""
        return super().forward(*arguments, swiftkv=_Shared(self.norm_swiftkv), **named)


class _ForCausalLM(_Stock):  # type: ignore[misc]
    """The model with its head."""

    _keys_to_ignore_on_load_unexpected = _Model._keys_to_ignore_on_load_unexpected
    model_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


def _classes(name: str) -> tuple[Any, Any]:
    """The base model and the model with its head, derived from transformers' own."""
    modeling = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    own_config = getattr(configs, f"{name}SwiftKVConfig")

    def derived(own: Any, stock: str, suffix: str, **entries: Any) -> Any:
        return type(f"{name}SwiftKV{suffix}", (own, getattr(modeling, f"{name}{stock}")), entries)

    attention = derived(_LateAttention, "Attention", "LateAttention", modeling=modeling)
    early = derived(_EarlyLayer, "DecoderLayer", "EarlyLayer")
    late = derived(_LateLayer, "DecoderLayer", "LateLayer", attention_class=attention)
    norm = getattr(modeling, f"{name}RMSNorm")
    model = derived(_Model, "Model", "Model", config_class=own_config, layer_classes=(early, late), norm_class=norm)
    return model, derived(_ForCausalLM, "ForCausalLM", "ForCausalLM", config_class=own_config, model_class=model)


LlamaSwiftKVModel, LlamaSwiftKVForCausalLM = _classes("Llama")
Qwen2SwiftKVModel, Qwen2SwiftKVForCausalLM = _classes("Qwen2")
Qwen3SwiftKVModel, Qwen3SwiftKVForCausalLM = _classes("Qwen3")
