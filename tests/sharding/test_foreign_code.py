"""Code that people put around a forward sees full tensors, whatever the way they put it there and whenever they do."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from omni_sp import ParallelMesh, parallelize
from omni_sp.sharding.foreign_code import (
    FunctionWatch,
    has_foreign_code,
    has_foreign_forward,
    is_foreign_function,
)
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.library_versions import OFFLOADS_GROUPS_ON_CPU
from tests.one_rank import by_one_rank
from tests.sharding.zoo.check import first_tensor
from tests.thorough import THOROUGH

QWEN, FLUX, WAN = "QwenImageTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"
Undo = Callable[[], Any]


def louder(output: Any) -> Any:
    """An output times what all its tokens say together."""
    if isinstance(output, tuple):
        return tuple(louder(part) for part in output)
    if hasattr(output, "sample"):
        return type(output)(sample=louder(output.sample))
    return output * (0.5 + float(output.abs().amax()))


def loud_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return louder(original(*args, **kwargs))

    return forward


def block_of(model: Any) -> torch.nn.Module:
    block: torch.nn.Module = (getattr(model, "transformer_blocks", None) or model.blocks)[0]
    return block


def feed_forward_of(model: Any) -> torch.nn.Module:
    return next(module for module in block_of(model).modules() if type(module).__name__ == "FeedForward")


def replace_on(module: Any) -> Undo:
    module.forward = loud_forward(module.forward)
    return lambda: vars(module).pop("forward")


def replace_on_class(kind: Any) -> Undo:
    original = kind.forward
    kind.forward = loud_forward(original)
    return lambda: setattr(kind, "forward", original)


def instance(model: Any) -> Undo:
    return replace_on(model)


def block(model: Any) -> Undo:
    return replace_on(block_of(model))


def model_class(model: Any) -> Undo:
    return replace_on_class(type(model))


def block_class(model: Any) -> Undo:
    return replace_on_class(type(block_of(model)))


def hook_on_block(model: Any) -> Undo:
    return block_of(model).register_forward_hook(lambda _module, _args, output: louder(output)).remove


def hook_on_last_layer(model: torch.nn.Module) -> Undo:
    return model.get_submodule("proj_out").register_forward_hook(lambda _module, _args, output: louder(output)).remove


def hook_inside_feed_forward(model: Any) -> Undo:
    layer = next(module for module in feed_forward_of(model).modules() if isinstance(module, torch.nn.Linear))
    return layer.register_forward_hook(lambda _module, _args, output: louder(output)).remove


def pre_hook_on_feed_forward(model: Any) -> Undo:
    return feed_forward_of(model).register_forward_pre_hook(lambda _module, args: louder(args)).remove


def pre_hook_on_transformer(model: torch.nn.Module) -> Undo:
    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": louder(kwargs["hidden_states"])}

    return model.register_forward_pre_hook(before, with_kwargs=True).remove


def global_hook(model: Any) -> Undo:
    chosen = block_of(model)
    return register_module_forward_hook(
        lambda module, _args, output: louder(output) if module is chosen else None
    ).remove


def processor_class(model: Any) -> Undo:
    kind = type(processor_of(model))
    original = kind.__call__
    kind.__call__ = loud_forward(original)
    return lambda: setattr(kind, "__call__", original)


def processor_of(model: Any) -> Any:
    return next(vars(module)["processor"] for module in block_of(model).modules() if "processor" in vars(module))


def swapped_class(model: Any) -> Undo:
    part = feed_forward_of(model)
    kind = type(part)
    part.__class__ = type("Louder", (kind,), {"forward": loud_forward(kind.forward), "__module__": __name__})
    return lambda: setattr(part, "__class__", kind)


def call_of_class(model: Any) -> Undo:
    kind = type(feed_forward_of(model))
    kind.__call__ = loud_forward(kind.__call__)  # type: ignore[method-assign]
    return lambda: delattr(kind, "__call__")


def call_of_instance(model: Any) -> Undo:
    part = feed_forward_of(model)
    part._call_impl = loud_forward(part._call_impl)  # type: ignore[method-assign]
    return lambda: delattr(part, "_call_impl")


def function_of_module(model: Any) -> Undo:
    """What a model's module calls by its name, such as the dispatcher of attention or rotary embeddings."""
    names = sys.modules[type(processor_of(model)).__module__]
    original = names.dispatch_attention_fn
    names.dispatch_attention_fn = loud_forward(original)  # type: ignore[attr-defined]
    return lambda: setattr(names, "dispatch_attention_fn", original)


def torch_function(model: Any) -> Undo:
    original = torch.nn.functional.gelu
    torch.nn.functional.gelu = loud_forward(original)
    return lambda: setattr(torch.nn.functional, "gelu", original)


def method_of_instance(model: Any) -> Undo:
    """A method beside forward."""
    gelu: Any = next(module for module in feed_forward_of(model).modules() if type(module).__name__ == "GELU")
    gelu.gelu = loud_forward(gelu.gelu)
    return lambda: delattr(gelu, "gelu")


KINDS = [
    processor_class,
    swapped_class,
    call_of_class,
    call_of_instance,
    function_of_module,
    torch_function,
    method_of_instance,
    instance,
    block,
    model_class,
    block_class,
    hook_on_block,
    hook_on_last_layer,
    hook_inside_feed_forward,
    pre_hook_on_feed_forward,
    pre_hook_on_transformer,
    global_hook,
]


def nothing(model: Any) -> None:
    pass


def with_registry(model: Any) -> None:
    """diffusers' registry of hooks is there, and has wrapped no forward."""
    from diffusers.hooks import HookRegistry

    for module in model.modules():
        HookRegistry.check_if_exists_or_initialize(module)


def with_group_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def with_accelerate(model: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


PREPARATIONS = [nothing, with_registry, with_accelerate]
if OFFLOADS_GROUPS_ON_CPU:
    PREPARATIONS.append(with_group_offload)


def error_with(
    mesh: ParallelMesh, entry_id: str, kind: Callable[[Any], Undo], prepare: Callable[[Any], None], before: bool
) -> tuple[float, float, float]:
    """Error with foreign code; what that code changes; error after it is gone."""
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]

    def without_and_with() -> tuple[torch.Tensor, torch.Tensor]:
        reference = randomise(entry.build())
        plain = first_tensor(reference(**entry.inputs()))
        undo = kind(reference)
        wanted = first_tensor(reference(**entry.inputs()))
        undo()
        return plain, wanted

    with torch.no_grad():
        plain, wanted = by_one_rank(mesh, without_and_with)
        model = randomise(entry.build())
        prepare(model)
        undo = kind(model) if before else lambda: None
        handle = parallelize(model, mesh)
        if not before:
            first_tensor(model(**entry.inputs()))
            undo = kind(model)
        try:
            error = relative_error(first_tensor(model(**entry.inputs())), wanted)
        finally:
            if prepare is nothing:
                undo()
        after = relative_error(first_tensor(model(**entry.inputs())), plain) if prepare is nothing else 0.0
        handle.remove()
    return error, relative_error(plain, wanted), after


CASES = [
    *((QWEN, kind, nothing, before) for kind in KINDS for before in (True, False)),
    *((entry_id, kind, nothing, False) for entry_id in (FLUX, WAN) for kind in (KINDS if THOROUGH else KINDS[2::4])),
    *(
        (QWEN, kind, prepare, before)
        for kind in (instance, block)
        for prepare in PREPARATIONS[1:]
        for before in (True, False)
    ),
]


@pytest.mark.parametrize(
    ("entry_id", "kind", "prepare", "before"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_foreign_code_sees_full_tensors(ranks: RankPool, entry_id: str, kind: Any, prepare: Any, before: bool) -> None:
    for error, effect, after in ranks.run(error_with, entry_id, kind, prepare, before, ulysses=2):
        assert effect > 1e-3
        assert error <= 1e-5
        assert after <= 1e-5


def tea_cache(model: Any) -> Undo:
    """Skips a forward whose input hardly differs from the last one, as scripts do that replace the class's forward."""
    kind = type(model)
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, inputs = vars(self), kwargs["hidden_states"]
        before, state["before"] = state.get("before"), inputs
        if before is not None and float((inputs - before).abs().mean() / before.abs().mean()) < 0.05:
            state["skipped"] = state.get("skipped", 0) + 1
            return state["output"]
        state["output"] = original(self, *args, **kwargs)
        return state["output"]

    kind.forward = forward
    return lambda: setattr(kind, "forward", original)


def denoised(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The outputs of several steps; the inputs of the middle ones hardly differ."""
    outputs = [
        first_tensor(model(**inputs | {"hidden_states": inputs["hidden_states"] * factor}))
        for factor in (1.0, 1.3, 1.31, 1.32, 2.0)
    ]
    return torch.stack(outputs)


def skipped_steps(mesh: ParallelMesh, entry_id: str) -> tuple[float, float, int]:
    from tests.sharding.zoo.all import ENTRIES

    entry = ENTRIES[entry_id]

    def without_and_with() -> tuple[torch.Tensor, torch.Tensor]:
        reference = randomise(entry.build())
        plain = denoised(reference, entry.inputs())
        undo = tea_cache(reference)
        try:
            return plain, denoised(reference, entry.inputs())
        finally:
            undo()

    with torch.no_grad():
        plain, wanted = by_one_rank(mesh, without_and_with)
        model = randomise(entry.build())
        handle = parallelize(model, mesh)
        undo = tea_cache(model)
        try:
            error = relative_error(denoised(model, entry.inputs()), wanted)
        finally:
            undo()
        handle.remove()
    return error, relative_error(plain, wanted), vars(model)["skipped"]


@pytest.mark.parametrize("entry_id", [QWEN, FLUX, WAN])
def test_a_cache_in_place_of_the_class_s_forward_decides_alike(ranks: RankPool, entry_id: str) -> None:
    for error, effect, skipped in ranks.run(skipped_steps, entry_id, ulysses=3):
        assert skipped == 2
        assert effect > 1e-4
        assert error <= 1e-5


def test_what_libraries_put_around_a_forward_is_not_foreign() -> None:
    from diffusers import QwenImageTransformer2DModel
    from diffusers.hooks import apply_layerwise_casting

    from tests.sharding.models import qwen_image

    for prepare in PREPARATIONS:
        model = qwen_image()
        prepare(model)
        assert isinstance(model, QwenImageTransformer2DModel)
        assert not any(map(has_foreign_code, model.modules()))
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert not any(map(has_foreign_code, model.modules()))


class Own(torch.nn.Module):
    """Somebody's own module, with a decorator of his own around its forward."""

    @loud_forward
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_class_s_own_code_is_not_foreign_to_it() -> None:
    assert not has_foreign_forward(Own())
    assert has_foreign_code(Own())
    linear = torch.nn.Linear(2, 2)
    assert not has_foreign_code(linear)
    linear.forward = functools.partial(linear.forward)  # type: ignore[method-assign]
    assert has_foreign_code(linear)


def test_functions_that_functions_of_diffusers_call_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    from tests.sharding.models import qwen_image

    watch = FunctionWatch({type(processor_of(qwen_image()))})
    assert watch.holds()
    assert not watch.foreign
    monkeypatch.setattr(attention_dispatch, "_AttentionBackendRegistry", object())
    assert not watch.holds()


def test_a_watch_is_kept_while_nobody_has_replaced_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_qwenimage

    from tests.sharding.models import qwen_image

    kinds = {type(processor_of(qwen_image()))}
    watch = FunctionWatch.of(kinds)
    assert FunctionWatch.of(kinds) is watch
    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", louder)
    changed = FunctionWatch.of(kinds)
    assert changed is not watch
    assert changed.foreign
    monkeypatch.undo()
    assert not FunctionWatch.of(kinds).foreign
    others = [type(f"Module{number}", (torch.nn.Module,), {}) for number in range(20)]
    watches = [FunctionWatch.of({kind}) for kind in others]
    assert all(FunctionWatch.of({kind}) is watch for kind, watch in zip(others[-8:], watches[-8:], strict=True))
    assert FunctionWatch.of({others[0]}) is not watches[0], "few are kept"


def test_a_cache_around_somebody_s_function_is_somebody_s() -> None:
    assert is_foreign_function(functools.lru_cache(louder))
    assert is_foreign_function(functools.partial(louder))
    assert not is_foreign_function(functools.partial(torch.add, 1))
