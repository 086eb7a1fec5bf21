"""What must raise instead of being wrong or hanging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from omni_sp import OmniSPError, ParallelMesh, ShardingError, UnsupportedModelError, parallelize
from omni_sp.sharding import ShardingPlan, plan_for
from testing.ranks import RankPool
from testing.reference import randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs, wan, wan_inputs


def own_plan(model: Any) -> ShardingPlan:
    """The plan of a class that has one."""
    plan = plan_for(model)
    assert isinstance(plan, ShardingPlan)
    return plan


def error_of(call: Callable[[], Any]) -> str:
    """Class and message of the error of ours that a call raises."""
    try:
        with torch.no_grad():
            call()
    except OmniSPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def replaced_processor(mesh: ParallelMesh) -> str:
    """In the middle of a forward; between forwards a new one is hooked."""
    model, inputs = randomise(qwen_image()), qwen_inputs()
    parallelize(model, mesh)
    attention = model.transformer_blocks[1].attn

    def replace(*_: Any) -> None:
        attention.set_processor(type(attention.processor)())

    model.transformer_blocks[0].register_forward_hook(replace)
    return error_of(lambda: model(**inputs))


def test_an_attention_that_bypasses_the_core_is_named(ranks: RankPool) -> None:
    for message in ranks.run(replaced_processor, ulysses=2):
        assert "transformer_blocks.1.attn did not pass through the parallel attention" in message


def changed_backend(mesh: ParallelMesh) -> str:
    model, inputs = randomise(qwen_image()), qwen_inputs()
    parallelize(model, mesh)
    model.set_attention_backend("native")
    return error_of(lambda: model(**inputs))


def test_changing_the_backend_afterwards_is_noticed(ranks: RankPool) -> None:
    for message in ranks.run(changed_backend, ring=2):
        assert (
            "transformer_blocks.0.attn did not pass through the parallel attention: its backend was changed" in message
        )


def cut_keys_called_whole(mesh: ParallelMesh) -> str:
    model, inputs = randomise(wan()), wan_inputs()
    plan = dataclasses.replace(own_plan(model), replicated_keys=("blocks.*.attn1", "blocks.*.attn2"))
    parallelize(model, mesh, plan=plan)
    return error_of(lambda: model(**inputs))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 3)])
def test_cut_keys_that_a_plan_calls_whole_are_found(ranks: RankPool, ulysses: int, ring: int) -> None:
    for message in ranks.run(cut_keys_called_whole, ulysses=ulysses, ring=ring):
        assert message.startswith("ShardingError: blocks.0.attn1 attends to keys that differ between the ranks")


def with_gradients(mesh: ParallelMesh) -> str:
    model, inputs = randomise(qwen_image()), qwen_inputs()
    parallelize(model, mesh)
    try:
        model(**inputs)
    except ShardingError as error:
        return str(error)
    return "no error"


def test_gradients_are_refused(ranks: RankPool) -> None:
    assert all("torch.no_grad()" in message for message in ranks.run(with_gradients, ulysses=2))


def recovers(mesh: ParallelMesh) -> tuple[str, float]:
    """A forward that fails in the middle leaves nothing behind for the next."""
    model, inputs = randomise(qwen_image()), qwen_inputs()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        parallelize(model, mesh)

        def explode(*_: Any) -> None:
            raise RuntimeError("in the middle")

        hook = model.transformer_blocks[1].register_forward_pre_hook(explode)
        try:
            model(**inputs)
            message = "no error"
        except RuntimeError as error:
            message = str(error)
        hook.remove()
        return message, relative_error(model(**inputs)[0], wanted)


def test_a_failed_forward_leaves_nothing_behind(ranks: RankPool) -> None:
    for message, error in ranks.run(recovers, ulysses=2, ring=2):
        assert message == "in the middle"
        assert error <= 1e-5


def interrupted(mesh: ParallelMesh) -> tuple[float, str, float]:
    """Ctrl-C in the middle, on every rank at the same point: the next forward works, and so does another model's."""
    model, other, inputs = randomise(qwen_image()), randomise(qwen_image()), qwen_inputs(text=3)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        handle = parallelize(model, mesh)
        parallelize(other, mesh)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        def break_off() -> None:
            hook = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
            hook.remove()

        break_off()
        error = relative_error(model(**inputs)[0], wanted)
        break_off()
        message = error_of(lambda: other(**inputs))
        handle.remove()
        return error, message, relative_error(other(**inputs)[0], wanted)


def test_an_interrupted_forward_leaves_nothing_behind(ranks: RankPool) -> None:
    for error, message, others in ranks.run(interrupted, ulysses=2, ring=2):
        assert error <= 1e-5
        assert "if that one was interrupted, remove() its handle" in message
        assert others <= 1e-5


def different_inputs(mesh: ParallelMesh) -> str:
    model = randomise(qwen_image())
    parallelize(model, ParallelMesh(mesh.config, ranks=mesh.ranks, check=True))
    return error_of(lambda: model(**qwen_inputs(text=13 + mesh.rank)))


def test_the_check_finds_ranks_with_different_inputs(ranks: RankPool) -> None:
    for message in ranks.run(different_inputs, ulysses=2):
        assert message.startswith("ShardingError: the ranks call the transformer with different inputs")


def alone(mesh: ParallelMesh) -> list[str]:
    """Refusals that need no exchange."""
    model, inputs = randomise(qwen_image()), qwen_inputs()
    messages = []
    handle = parallelize(model, mesh)
    messages.append(error_of(lambda: parallelize(model, mesh)))
    messages.append(error_of(lambda: model.pos_embed([(1, 5, 7)], max_txt_seq_len=3)))
    messages.append(error_of(lambda: model.transformer_blocks[0].attn(hidden_states=torch.zeros(1, 2, 48))))
    handle.remove()
    handle.remove()
    messages.append(error_of(lambda: model(**inputs)))
    messages.append(error_of(lambda: parallelize(torch.nn.Linear(2, 2), mesh)))
    messages.append(error_of(lambda: parallelize(object(), mesh)))
    messages.append(error_of(lambda: parallelize(model, mesh, attention_backend="flsh")))
    wrong = own_plan(model).with_inputs(
        "proj_out", inputs={"nonsense": own_plan(model).modules["transformer_blocks.0"].inputs["hidden_states"]}
    )
    messages.append(error_of(lambda: parallelize(model, mesh, plan=wrong)))
    unknown = ShardingPlan(modules={"blocks": wrong.modules["proj_out"]})
    messages.append(error_of(lambda: parallelize(model, mesh, plan=unknown)))
    messages.append(error_of(lambda: model(**inputs)))
    return messages


def test_refusals_name_what_is_wrong(ranks: RankPool) -> None:
    wanted = [
        "ShardingError: QwenImageTransformer2DModel is parallelized already",
        "ShardingError: pos_embed was called on its own",
        "ShardingError: transformer_blocks.0.attn was called on its own",
        "no error",
        "UnsupportedModelError: Linear has no sharding plan",
        "UnsupportedModelError: object has no transformer",
        "UnsupportedAttentionError: no attention kernel",
        "UnsupportedModelError: the plan for QwenImageTransformer2DModel cuts ['nonsense'] of 'proj_out'",
        "UnsupportedModelError: the plan for QwenImageTransformer2DModel speaks of 'blocks'",
        "no error",
    ]
    for messages in ranks.run(alone, ulysses=2):
        assert len(messages) == len(wanted)
        for got, start in zip(messages, wanted, strict=True):
            assert got.startswith(start)


def test_one_rank_runs_what_has_no_plan() -> None:
    from omni_sp import DiffusionParallelConfig

    model = torch.nn.Linear(2, 2)
    parallelize(model, ParallelMesh(DiffusionParallelConfig())).remove()
    assert not model._forward_pre_hooks
    with pytest.raises(UnsupportedModelError):
        plan_for(model)


def untouched(mesh: ParallelMesh) -> bool:
    """Only instances are changed, and they get back all of it."""
    model, bystander = randomise(qwen_image()), qwen_image()
    processor = model.transformer_blocks[0].attn.processor
    before = dict(vars(processor))
    handle = parallelize(model, mesh)
    inside = (
        processor._attention_backend is not None
        and bystander.transformer_blocks[0].attn.processor._attention_backend is None
    )
    handle.remove()
    hooks = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    return inside and not hooks and dict(vars(processor)) == before and type(processor)._attention_backend is None


def test_nothing_is_patched_on_classes(ranks: RankPool) -> None:
    assert all(ranks.run(untouched, ulysses=2))
