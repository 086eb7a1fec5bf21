"""What must raise instead of being wrong or hanging."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from omni_sp import (
    DiffusionParallelConfig,
    OmniSPError,
    ParallelMesh,
    ShardingError,
    UnsupportedModelError,
    parallelize,
    sharding,
)
from omni_sp.sharding import Plan, Split, plan_for
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs, wan, wan_inputs


def error_of(call: Callable[[], Any]) -> str:
    """Class and message of the error of ours that a call raises."""
    try:
        with torch.no_grad():
            call()
    except OmniSPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_what_is_mistaken_for_a_pipeline_a_mesh_or_a_plan() -> None:
    mesh, model = ParallelMesh(DiffusionParallelConfig()), torch.nn.Linear(2, 2)
    for given in (None, "Qwen/Qwen-Image", [model], type(model)):
        assert "load it first" in error_of(lambda: parallelize(given, mesh))  # noqa: B023  (it is called at once)
    for other in (None, DiffusionParallelConfig(), "auto"):
        assert "give parallelize() a ParallelMesh" in error_of(lambda: parallelize(model, other))  # type: ignore[arg-type]  # noqa: B023
    assert "give a Plan" in error_of(lambda: parallelize(model, mesh, plan={}))  # type: ignore[arg-type]


def compiled_as_a_whole(mesh: ParallelMesh) -> list[str]:
    """Before and after parallelize(), by the function and in place; and a block that the function wraps."""

    def message(prepare: Callable[[Any], Any], finish: Callable[[Any], Any] = lambda model: model) -> str:
        torch.compiler.reset()  # what other tests compiled in this process counts against torch's limits
        given = prepare(randomise(wan()))

        def run() -> None:
            parallelize(given, mesh)
            finish(given)(**wan_inputs())

        try:
            return error_of(run)
        finally:
            torch.compiler.reset()

    def compile_in_place(model: Any) -> Any:
        model.compile(backend="eager")
        return model

    def wrap_a_block(model: Any) -> Any:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
        return model

    def compile_whole(model: Any) -> Any:
        return torch.compile(model, backend="eager")

    def leave(model: Any) -> Any:
        return model

    return [
        message(compile_whole),
        message(compile_in_place),
        message(leave, compile_whole),
        message(leave, compile_in_place),
        message(wrap_a_block),
    ]


def test_what_is_compiled_as_a_whole_is_told_what_works(ranks: RankPool) -> None:
    """`test_compile.py` shows that it does."""
    for *whole, block in ranks.run(compiled_as_a_whole, ulysses=2):
        for message in whole:
            assert "UnsupportedModelError: WanTransformer3DModel is compiled as a whole" in message
        assert "blocks.1 of WanTransformer3DModel is wrapped by torch.compile()" in block
        for message in (*whole, block):
            assert "parallelize(..., compile=True), or in place" in message


def copies(mesh: ParallelMesh) -> list[str]:
    model = randomise(wan())
    handle = parallelize(model, mesh)
    calls = [
        lambda: copy.deepcopy(model),
        lambda: copy.deepcopy({"a pipeline": model}),
        lambda: pickle.dumps(model),
        lambda: torch.save(model, io.BytesIO()),
        lambda: copy.deepcopy(handle),
        lambda: pickle.dumps(handle),
    ]
    messages = [error_of(call) for call in calls]
    torch.save(model.state_dict(), io.BytesIO())
    handle.remove()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        assert torch.equal(copied(**wan_inputs())[0], model(**wan_inputs())[0])
    assert "__reduce_ex__" not in vars(model)
    return messages


def test_copies_of_what_is_parallelized_are_refused(ranks: RankPool) -> None:
    for *of_model, _, of_handle in ranks.run(copies, ulysses=2):
        for message in of_model[:4]:
            assert (
                "ShardingError: WanTransformer3DModel is parallelized, and a copy of it would not be: call" in message
            )
        assert "ShardingError: the handle of parallelize() belongs to this process" in of_handle


def changed_backend(mesh: ParallelMesh) -> float:
    model, inputs = randomise(qwen_image()), qwen_inputs()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        parallelize(model, mesh)
        model(**inputs)
        model.set_attention_backend("native")
        return relative_error(model(**inputs)[0], wanted)


def test_another_backend_afterwards_is_exact(ranks: RankPool) -> None:
    """Whatever a processor calls, it calls it with sharded tensors."""
    assert max(ranks.run(changed_backend, ring=2)) <= 1e-5


def test_what_plans_were_is_named_with_what_to_write_instead() -> None:
    for name in ("ShardingPlan", "ModulePlan", "Gather", "TrackedPlan", "tracked_plan_for"):
        with pytest.raises(UnsupportedModelError, match=rf'has no {name} any more.*plan=Plan\(\{{"transformer_blocks'):
            getattr(sharding, name)
    with pytest.raises(AttributeError):
        getattr(sharding, "Plann")  # noqa: B009


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
        assert message.startswith("ShardingError: the ranks call QwenImageTransformer2DModel with different inputs: ")
        assert "rank 0: (1, 13, 24)" in message


def alone(mesh: ParallelMesh) -> list[str]:
    """Refusals that need no exchange."""
    model, inputs = randomise(qwen_image()), qwen_inputs()
    messages = []
    handle = parallelize(model, mesh)
    messages.append(error_of(lambda: parallelize(model, mesh)))
    messages.append(error_of(lambda: model.transformer_blocks[0](torch.zeros(1, 2, 48))))
    handle.remove()
    handle.remove()
    messages.append(error_of(lambda: model(**inputs)))
    messages.append(error_of(lambda: parallelize(torch.nn.Linear(2, 2), mesh)))
    messages.append(error_of(lambda: parallelize(object(), mesh)))
    messages.append(error_of(lambda: parallelize(model, mesh, attention_backend="flsh")))
    for path, name in (("proj_out", "nonsense"), ("blocks", "hidden_states")):
        plan = Plan({path: {name: Split(dim=1)}})
        messages.append(error_of(lambda plan=plan: parallelize(model, mesh, plan=plan)))  # type: ignore[misc]
    for options in ({"replay": False}, {"compile": "fastest"}):
        compiling = {"compile": True, **options}
        messages.append(error_of(lambda options=compiling: parallelize(model, mesh, **options)))  # type: ignore[misc]
    messages.append(error_of(lambda: model(**inputs)))
    return messages


def test_refusals_name_what_is_wrong(ranks: RankPool) -> None:
    wanted = [
        "ShardingError: QwenImageTransformer2DModel is parallelized already",
        "ShardingError: transformer_blocks.0 was called on its own",
        "no error",
        "UnsupportedModelError: Linear has no list of blocks",
        "UnsupportedModelError: object has no transformer",
        "UnsupportedAttentionError: no attention kernel",
        "UnsupportedModelError: the plan for QwenImageTransformer2DModel cuts ['nonsense'] of 'proj_out'",
        "UnsupportedModelError: the plan for QwenImageTransformer2DModel speaks of 'blocks'",
        "ConfigError: compile=... needs replay=True",
        "ConfigError: compile='fastest': torch.compile has no such mode",
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
