"""SwiftKV in plain transformers: its formulas, its files, and over ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from omni_sp.errors import ConfigError
from omni_sp.llm.hf.model import parallelize
from omni_sp.llm.swiftkv import config as configs
from omni_sp.llm.swiftkv import reference
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.components import VOCABULARY_SIZE
from omni_sp.testing.models import save_swiftkv_model
from omni_sp.testing.ranks import RankPool

LAYERS, FIRST = 5, 2
PROMPT = torch.randint(3, VOCABULARY_SIZE, (1, 19), generator=torch.Generator().manual_seed(1))


def rotated(heads: Tensor, model: Any) -> Tensor:
    """(batch, heads, tokens, head_dim) at their positions."""
    cos, sin = model.model.rotary_emb(heads, torch.arange(heads.shape[2])[None])
    front, back = heads.chunk(2, dim=-1)
    turned: Tensor = heads * cos[:, None] + torch.cat((-back, front), dim=-1) * sin[:, None]
    return turned


def normalised(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def by_formula(model: Any, group: int, ids: Tensor) -> Tensor:
    """Logits of all tokens, by the weights of a model and the formulas alone."""
    weights = model.state_dict()
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // 4

    def heads(hidden: Tensor, layer: int, which: str) -> Tensor:
        name = f"model.layers.{layer}.self_attn.{which}_proj{'_swiftkv' if layer >= FIRST else ''}"
        projected = F.linear(hidden, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        split = projected.unflatten(-1, (-1, head_dim))
        norm = weights.get(f"model.layers.{layer}.self_attn.{which}_norm.weight")
        split = split if norm is None else normalised(split, norm)
        return split.transpose(1, 2) if which == "v" else rotated(split.transpose(1, 2), model)

    hidden = weights["model.embed_tokens.weight"][ids]
    shared = hidden
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        if layer == FIRST:
            shared = normalised(hidden, weights["model.norm_swiftkv.weight"])
        own_input = normalised(hidden, weights[f"{own}.input_layernorm.weight"])
        source, makes = (shared, layer - (layer - FIRST) % group) if layer >= FIRST else (own_input, layer)
        query, key, value = heads(own_input, layer, "q"), heads(source, makes, "k"), heads(source, makes, "v")
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = hidden + F.linear(out.transpose(1, 2).flatten(2), weights[f"{own}.self_attn.o_proj.weight"])
        inner = normalised(hidden, weights[f"{own}.post_attention_layernorm.weight"])
        gate, up = (F.linear(inner, weights[f"{own}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        hidden = hidden + F.linear(F.silu(gate) * up, weights[f"{own}.mlp.down_proj.weight"])
    return F.linear(normalised(hidden, weights["model.norm.weight"]), weights["lm_head.weight"])


@cache
def saved(folder: Path, kind: str, group: int, *, with_replaced: bool = False) -> Any:
    return save_swiftkv_model(
        kind, folder, num_layers=LAYERS, num_key_value_layers=FIRST, key_value_group_size=group,
        with_replaced=with_replaced,
    )  # fmt: skip


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_formulas_and_the_cache_give_the_same(tmp_path: Path, kind: str, group: int) -> None:
    model = saved(tmp_path, kind, group)
    with torch.no_grad():
        logits = model(PROMPT).logits
        torch.testing.assert_close(logits, by_formula(model, group, PROMPT), rtol=1e-4, atol=1e-4)
        hidden = model(PROMPT, output_hidden_states=True).hidden_states
        assert len(hidden) == LAYERS + 1
        answer = model.generate(PROMPT, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        one_by_one = PROMPT
        for _ in range(5):
            one_by_one = torch.cat((one_by_one, model(one_by_one).logits[:, -1:].argmax(-1)), dim=1)
    assert answer.equal(one_by_one)


def test_the_first_late_layer_with_its_teachers_weights_is_its_teacher(tmp_path: Path) -> None:
    student = save_swiftkv_model("qwen3", tmp_path, num_layers=3, num_key_value_layers=2)
    plain = {name: value for name, value in student.config.to_dict().items() if name != "model_type"}
    teacher = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**plain)).eval()
    weights = {name.replace("_swiftkv", ""): value for name, value in student.state_dict().items()}
    teacher.load_state_dict(
        {name: value for name, value in weights.items() if name != "model.norm.weight"}, strict=False
    )
    with torch.no_grad():
        teacher.model.norm.weight.copy_(student.model.norm.weight)
        student.model.norm_swiftkv.weight.copy_(student.model.layers[2].input_layernorm.weight)
        assert torch.equal(student(PROMPT).logits, teacher(PROMPT).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_file_with_the_teachers_matrices_is_read_as_one_without(tmp_path: Path) -> None:
    model = saved(tmp_path, "qwen3", 2, with_replaced=True)
    config = configs.Qwen3SwiftKVConfig.from_pretrained(tmp_path)
    assert configs.late_layers(config) == (FIRST, 2)
    read, info = reference.Qwen3SwiftKVForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert read.eval()(PROMPT).logits.equal(model(PROMPT).logits)


def on_ranks_generate(mesh: ParallelMesh, folder: Path) -> list[Tensor]:
    torch.set_num_threads(1)
    model = reference.Qwen3SwiftKVForCausalLM.from_pretrained(folder).eval()
    handle = parallelize(model, mesh)
    return [handle.generate(PROMPT, max_new_tokens=5, prefill_chunk=chunk, eos_token_id=()) for chunk in (None, 6)]


def test_ranks_share_the_tokens_of_a_swiftkv_model(tmp_path: Path, ranks: RankPool) -> None:
    model = saved(tmp_path, "qwen3", 2)
    alone = model.generate(PROMPT, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for answers in ranks.run(on_ranks_generate, tmp_path, ulysses=2, ring=2):
        assert all(answer.equal(alone) for answer in answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_layers": None}, "num_key_value_layers=None"),
        ({"num_key_value_layers": 0}, "num_key_value_layers=0"),
        ({"num_key_value_layers": 4}, "num_key_value_layers=4 of 4 layers"),
        ({"num_key_value_layers": 2, "key_value_group_size": 0}, "key_value_group_size=0"),
        ({"num_key_value_layers": 2, "swiftkv": False}, "swiftkv=False"),
        ({"num_key_value_layers": 2, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "'sliding_att"),
    ],
)
def test_an_impossible_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    config = configs.Qwen2SwiftKVConfig(num_hidden_layers=4, **changes)
    with pytest.raises(ConfigError, match=message):
        configs.late_layers(config)
