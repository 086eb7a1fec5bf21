"""What is refused by name, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.errors import InvalidInputError, ShardingError, UnsupportedAttentionError, UnsupportedModelError
from omni_sp.llm.hf.model import parallelize
from tests.llm.hf import tiny

IDS = tiny.prompt(13)


@pytest.fixture
def mesh() -> ParallelMesh:
    return ParallelMesh(DiffusionParallelConfig())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(IDS, use_cache=True), InvalidInputError, "handle.generate"),
        (lambda m: m.generate(IDS, max_new_tokens=2, do_sample=False), InvalidInputError, "handle.generate"),
        (lambda m: m(IDS, labels=IDS), InvalidInputError, "no loss over ranks"),
        (lambda m: m(IDS, output_attentions=True), UnsupportedAttentionError, "no rank has all"),
        (lambda m: m(IDS, attention_mask=torch.ones(1, 1, 13, 13)), UnsupportedAttentionError, "(1, 1, 13, 13)"),
        (lambda m: m(IDS, attention_mask={"full_attention": None}), UnsupportedAttentionError, "dict"),
        (lambda m: m(IDS, is_causal=False), InvalidInputError, "takes no is_causal"),
        (lambda m: m(IDS, logits_to_keep=-1), InvalidInputError, "logits_to_keep=-1"),
        (lambda m: m(IDS, logits_to_keep=torch.tensor([13])), InvalidInputError, "13 tokens"),
        (lambda m: m(IDS, logits_to_keep=torch.ones(1, 13, dtype=torch.bool)), InvalidInputError, "bool"),
        (lambda m: m(), InvalidInputError, "input_ids or inputs_embeds"),
        (lambda m: m(IDS[:, :0]), InvalidInputError, "(1, 0)"),
        (lambda m: m.train()(IDS), UnsupportedModelError, "model.eval()"),
        (
            lambda m: m.model.layers[0](torch.ones(1, 3, 48), position_embeddings=(torch.ones(1, 3, 8),) * 2),
            ShardingError,
            "layer 0",
        ),
    ],
)
def test_a_call_that_could_not_be_exact_is_refused(
    mesh: ParallelMesh, call: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    model = tiny.model("llama, one kv head")
    parallelize(model, mesh)
    with torch.no_grad(), pytest.raises(error) as raised:
        call(model)
    assert words in str(raised.value)


def test_gradients_are_refused_where_they_would_be_lost(mesh: ParallelMesh) -> None:
    model = tiny.model("mistral")
    parallelize(model, mesh)
    with pytest.raises(UnsupportedAttentionError, match="no_grad"):
        model(IDS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": 2, "prefill_chunk": 0}, "prefill_chunk=0"),
        ({"max_new_tokens": 2, "attention_mask": torch.zeros(1, 13)}, "rows [0]"),
        ({"max_new_tokens": 2, "attention_mask": torch.ones(1, 12)}, "(1, 12)"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(mesh: ParallelMesh, options: dict[str, Any], words: str) -> None:
    handle = parallelize(tiny.model("mistral"), mesh)
    with pytest.raises(InvalidInputError) as raised:
        handle.generate(IDS, **options)
    assert words in str(raised.value)


def test_a_sliding_window_is_refused_beyond_its_length_and_exact_within(mesh: ParallelMesh) -> None:
    model = tiny.model("windows")
    wanted = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=7, do_sample=False, pad_token_id=0)
    handle = parallelize(model, mesh)
    assert handle.generate(IDS, max_new_tokens=7).equal(wanted)
    with pytest.raises(UnsupportedAttentionError, match="sliding window of 20 tokens, and the row has 21"):
        handle.generate(IDS, max_new_tokens=8)
    assert handle.cache_bytes() == 0
    with torch.no_grad(), pytest.raises(UnsupportedAttentionError, match="the row has 34"):
        model(tiny.prompt(34))


def test_models_that_are_not_handled_are_refused_by_name(mesh: ParallelMesh) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not one of LlamaForCausalLM, LlamaModel"):
        parallelize(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        parallelize(tiny.model("llama, one kv head", "ForSequenceClassification"), mesh)
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        parallelize(tiny.model("growing"), mesh)


def test_a_model_is_parallelized_once_at_a_time(mesh: ParallelMesh) -> None:
    model = tiny.model("mistral")
    handle = parallelize(model, mesh)
    for again in (model, model.model):
        with pytest.raises(UnsupportedModelError, match="already"):
            parallelize(again, mesh)
    handle.remove()
    with pytest.raises(InvalidInputError, match="parallelize"):
        handle.generate(IDS, max_new_tokens=2)
    parallelize(model, mesh).remove()


def test_a_model_without_a_head_does_not_generate(mesh: ParallelMesh) -> None:
    handle = parallelize(tiny.model("mistral", "Model"), mesh)
    with pytest.raises(InvalidInputError, match="MistralModel has no head"):
        handle.generate(IDS, max_new_tokens=2)
