"""Prompts over ranks, against the same model of transformers in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from omni_sp.errors import ShardingError
from omni_sp.llm.hf.model import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.llm.hf import tiny

LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]
LENGTHS = (1, 7, 13, 34, 161)
KEPT = torch.tensor([33, 0, 7, -1, 20, 7])


@cache
@torch.no_grad()
def last_logits(name: str, tokens: int) -> torch.Tensor:
    return reference(name)(tiny.prompt(tokens)).logits[:, -1:]  # type: ignore[no-any-return]


@cache
def reference(name: str, suffix: str = "ForCausalLM") -> Any:
    return tiny.model(name, suffix)


def on_ranks_last_logits(mesh: ParallelMesh, name: str) -> list[torch.Tensor]:
    model = tiny.model(name)
    parallelize(model, mesh)
    with torch.no_grad():
        return [model(tiny.prompt(tokens), logits_to_keep=1).logits for tokens in LENGTHS]


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_the_last_token_s_logits_are_those_of_one_process(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    answers = ranks.run(on_ranks_last_logits, name, ulysses=ulysses, ring=ring)
    for answer in answers:
        for tokens, logits in zip(LENGTHS, answer, strict=True):
            assert relative_error(logits, last_logits(name, tokens)) < 1e-5


def on_ranks_everything(mesh: ParallelMesh, name: str) -> dict[str, Any]:
    model = tiny.model(name)
    parallelize(model, mesh)
    ids = tiny.prompt(34, batch=2)
    with torch.no_grad():
        every = model(input_ids=ids, output_hidden_states=True)
        return {
            "logits": every.logits,
            "hidden": every.hidden_states,
            "last 3": model(ids, logits_to_keep=3).logits,
            "some": model(ids, logits_to_keep=KEPT).logits,
            "moved": model(ids, position_ids=torch.arange(34)[None] + 9, logits_to_keep=1).logits,
            "embedded": model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=1).logits,
            "tuple": model(ids, logits_to_keep=1, return_dict=False)[0],
        }


@pytest.mark.parametrize("name", ["qwen3, norms", "yarn"])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 3)])
def test_logits_and_hidden_states_are_given_where_they_are_asked_for(
    ranks: RankPool, name: str, ulysses: int, ring: int
) -> None:
    ids = tiny.prompt(34, batch=2)
    with torch.no_grad():
        wanted = reference(name)(ids, output_hidden_states=True)
        moved = reference(name)(ids, position_ids=torch.arange(34)[None] + 9).logits[:, -1:]
    for answer in ranks.run(on_ranks_everything, name, ulysses=ulysses, ring=ring):
        assert relative_error(answer["logits"], wanted.logits) < 1e-5
        assert relative_error(answer["last 3"], wanted.logits[:, -3:]) < 1e-5
        assert relative_error(answer["some"], wanted.logits[:, KEPT]) < 1e-5
        assert relative_error(answer["moved"], moved) < 1e-5
        for form in ("embedded", "tuple"):
            assert relative_error(answer[form], wanted.logits[:, -1:]) < 1e-5
        for got, state in zip(answer["hidden"], wanted.hidden_states, strict=True):
            assert relative_error(got, state) < 1e-5


def on_ranks_encode(mesh: ParallelMesh, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = tiny.model("qwen3, norms", "Model")
    handle = parallelize(model, mesh)
    ids, mask = tiny.padded((23, 9, 30), side)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        own = handle.local_hidden_states(ids, attention_mask=mask)
    return whole, own.hidden, own.positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), *LAYOUTS])
def test_a_text_encoder_gives_whole_hidden_states_or_each_rank_s_own(
    ranks: RankPool, side: str, ulysses: int, ring: int
) -> None:
    ids, mask = tiny.padded((23, 9, 30), side)
    with torch.no_grad():
        wanted = reference("qwen3, norms", "Model")(input_ids=ids, attention_mask=mask).last_hidden_state
    real, seen = mask.bool(), []
    for whole, own, positions in ranks.run(on_ranks_encode, side, ulysses=ulysses, ring=ring):
        assert relative_error(whole[real], wanted[real]) < 1e-5
        assert own.equal(whole[:, positions])
        seen += positions.tolist()
    assert sorted(seen) == list(range(30))


def on_ranks_removed(mesh: ParallelMesh) -> tuple[list[torch.Tensor], bool, list[torch.Tensor]]:
    model = tiny.model("qwen2, bias")
    ids = tiny.prompt(13)

    def alone() -> list[torch.Tensor]:
        with torch.no_grad():
            answer = model(ids, use_cache=True)
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            return [answer.logits, answer.past_key_values.layers[1].keys, tokens]

    before, attributes = alone(), [set(vars(module)) for module in model.modules()]
    handle = parallelize(model, mesh)
    with torch.no_grad():
        shared = model(ids).logits
    handle.remove()
    handle.remove()
    same = attributes == [set(vars(module)) for module in model.modules()]
    same &= all(layer.self_attn.config is model.config for layer in model.model.layers)
    return before, same and relative_error(shared, before[0]) < 1e-5, alone()


def test_remove_gives_back_the_model_to_the_last_bit(ranks: RankPool) -> None:
    for before, same, after in ranks.run(on_ranks_removed, ulysses=2):
        assert same
        assert all(one.equal(other) for one, other in zip(before, after, strict=True))


def test_another_model_of_the_same_config_stays_as_it_is() -> None:
    shared = tiny.config("qwen3, norms")
    kind: Any = type(reference("qwen3, norms"))
    one, other = kind(shared).eval(), kind(shared).eval()
    ids = tiny.prompt(13)
    with torch.no_grad():
        before = other(ids).logits
        parallelize(one, ParallelMesh(tiny.one_rank()))
        assert other(ids).logits.equal(before)
        assert one(ids).logits.shape == before.shape


def on_ranks_half_precision(mesh: ParallelMesh) -> torch.Tensor:
    model = tiny.model("llama, one kv head", dtype=torch.bfloat16)
    parallelize(model, mesh)
    with torch.no_grad():
        return model(tiny.prompt(161)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 3)])
def test_bfloat16_is_as_exact_as_one_process_in_bfloat16(ranks: RankPool, ulysses: int, ring: int) -> None:
    rounded = tiny.model("llama, one kv head", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = rounded.float()(tiny.prompt(161)).logits
        alone = rounded.bfloat16()(tiny.prompt(161)).logits
    for logits in ranks.run(on_ranks_half_precision, ulysses=ulysses, ring=ring):
        assert relative_error(logits, wanted) < 1.5 * relative_error(alone, wanted)


def on_ranks_disagreeing(mesh: ParallelMesh) -> list[str]:
    model = tiny.model("mistral")
    handle = parallelize(model, mesh)
    ids = tiny.prompt(13)
    own = ids.flip(1) if mesh.rank else ids
    messages = []
    calls: list[Callable[[], Any]] = [
        lambda: model(own),
        lambda: model(ids[:, : 12 + mesh.rank]),
        lambda: model(ids, logits_to_keep=1 + mesh.rank),
        lambda: handle.generate(ids, max_new_tokens=2 + mesh.rank),
        lambda: handle.generate(ids, max_new_tokens=2, eos_token_id=mesh.rank),
    ]
    for call in calls:
        with torch.no_grad(), pytest.raises(ShardingError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_ranks_called_with_different_inputs_name_what_differs(ranks: RankPool) -> None:
    names = ["input_ids", "tokens", "logits_to_keep", "max_new_tokens", "eos_token_id"]
    for messages in ranks.run(on_ranks_disagreeing, ulysses=2):
        for name, message in zip(names, messages, strict=True):
            assert f"different {name} " in message
            assert "rank 1" in message
