"""Transformers that people change, before or after parallelize(): LoRA, IP-Adapters, diffusers' step caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.library_versions import caches_after_a_call
from tests.one_rank import by_one_rank
from tests.sharding.zoo.check import first_tensor
from tests.thorough import in_turns

QWEN, FLUX, WAN = "QwenImageTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"
COG, SD3 = "CogVideoXTransformer3DModel", "SD3Transformer2DModel"
NUM_STEPS = 8


def add_lora(model: Any) -> None:
    """A LoRA on every linear layer, the first and the last included."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"), adapter_name="style")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.requires_grad_(False)


def remove_lora(model: Any) -> None:
    model.unload_lora()


def add_ip_adapter(model: Any) -> None:
    from tests.sharding.zoo.flux import with_ip_adapter

    state = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(with_ip_adapter(model), seed=3)
    model.load_state_dict(state, strict=False)


def changed(
    mesh: ParallelMesh, entry_id: str, change: Callable[[Any], None], before: bool, undo: Callable[[Any], None] | None
) -> tuple[float, float, bool, float]:
    """Error; how much the change itself changes; whether remove() gives back the bits; error after undoing it."""
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]
    arguments = entry.inputs()
    if change is add_ip_adapter:
        from tests.sharding.zoo.flux import ip_adapter_inputs

        arguments |= ip_adapter_inputs()

    def without_and_with() -> tuple[torch.Tensor, torch.Tensor]:
        reference = randomise(entry.build())
        plain = first_tensor(reference(**entry.inputs()))
        change(reference)
        return plain, first_tensor(reference(**arguments))

    with torch.no_grad():
        plain, wanted = by_one_rank(mesh, without_and_with)
        model = randomise(entry.build())
        if before:
            change(model)
        handle = parallelize(model, mesh)
        if not before:
            assert relative_error(first_tensor(model(**entry.inputs())), plain) <= 1e-5
            change(model)
        error = relative_error(first_tensor(model(**arguments)), wanted)
        undone = 0.0
        if undo is not None:
            undo(model)
            undone = relative_error(first_tensor(model(**entry.inputs())), plain)
            change(model)
        handle.remove()
        restored = torch.equal(first_tensor(model(**arguments)), wanted)
    return error, relative_error(plain, wanted), restored, undone


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("entry_id", "change", "undo"),
    [
        (QWEN, add_lora, remove_lora),
        (FLUX, add_lora, remove_lora),
        (WAN, add_lora, remove_lora),
        (SD3, add_lora, remove_lora),
        (FLUX, add_ip_adapter, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parts_that_are_replaced_are_hooked_anew(
    ranks: RankPool, entry_id: str, change: Any, undo: Any, before: bool
) -> None:
    for error, effect, restored, undone in ranks.run(changed, entry_id, change, before, undo, ulysses=3):
        assert effect > 1e-3
        assert error <= 1e-5
        assert restored
        assert undone <= 1e-5


def first_block(_: Any) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.04)


def taylor(_: Any) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*\.attn\d*"],
    )


def mag(_: Any) -> Any:
    from diffusers import MagCacheConfig

    return MagCacheConfig(threshold=0.3, num_inference_steps=NUM_STEPS, mag_ratios=[1.0, 0.98] * (NUM_STEPS // 2))


def pyramid(now: Callable[[], int]) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3, current_timestep_callback=now
    )


def faster(now: Callable[[], int]) -> Any:
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        attention_weight_callback=lambda _: 0.3,
        is_guidance_distilled=True,
        current_timestep_callback=now,
    )


CACHES = {"first block": first_block, "taylor": taylor, "mag": mag, "pyramid": pyramid, "faster": faster}
KEEP_STATE = ("first block", "taylor")  # from one call to the next, in diffusers' hooks


class Denoising:
    """Several calls whose inputs drift apart slowly and then fast, as a pipeline's do, and what they compute."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.timestep = 0
        self.layers_run = 0

    def now(self) -> int:
        return self.timestep

    def run(self, num_steps: int = NUM_STEPS) -> torch.Tensor:
        results = []
        self.layers_run = 0
        hooks = [
            module.register_forward_hook(self._count)
            for module in self.model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        drift = 0.0
        for step in range(num_steps):
            self.timestep = 850 - 100 * step
            drift += 0.01 if step < 4 else 0.3 * (step - 3)
            inputs = {**self.inputs, "hidden_states": self.inputs["hidden_states"] * (1 + drift)}
            with self.model.cache_context("cond") if hasattr(self.model, "cache_context") else nullcontext():
                results.append(first_tensor(self.model(**inputs)))
        self.model._reset_stateful_cache()
        for hook in hooks:
            hook.remove()
        return torch.stack(results)

    def _count(self, *_: Any) -> None:
        self.layers_run += 1


def cached(mesh: ParallelMesh, entry_id: str, cache: str, before: bool) -> tuple[float, float, int, int, int, float]:
    """Error; what the cache itself changes; layers run over ranks, on one process, and without the cache; error
    without the cache, after it was disabled."""
    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]

    def without_and_with() -> tuple[torch.Tensor, int, torch.Tensor, int]:
        alone = Denoising(randomise(entry.build()), entry.inputs())
        plain, without = alone.run(), alone.layers_run
        alone.model.enable_cache(CACHES[cache](alone.now))
        return plain, without, alone.run(), alone.layers_run

    with torch.no_grad():
        plain, without, wanted, layers_wanted = by_one_rank(mesh, without_and_with)
        ours = Denoising(randomise(entry.build()), entry.inputs())
        if before:
            ours.model.enable_cache(CACHES[cache](ours.now))
        handle = parallelize(ours.model, mesh)
        if not before:
            ours.run(2)
            ours.model.enable_cache(CACHES[cache](ours.now))
        found = ours.run()
        layers_run = ours.layers_run
        ours.model.disable_cache()
        disabled = relative_error(ours.run(), plain)
        handle.remove()
    effect = relative_error(plain, wanted)
    return relative_error(found, wanted), effect, layers_run, layers_wanted, without, disabled


@pytest.mark.parametrize(
    ("entry_id", "cache", "before"),
    [
        pytest.param(entry_id, cache, before, marks=[caches_after_a_call] if cache in KEEP_STATE else [])
        for cache, (entry_id, before) in [
            *((cache, (QWEN, before)) for cache in CACHES for before in (False, True)),
            *in_turns(CACHES, [(FLUX, False), (WAN, False), (COG, False)]),
        ]
    ],
    ids=str,
)
def test_step_caches_decide_alike_and_from_the_whole(ranks: RankPool, entry_id: str, cache: str, before: bool) -> None:
    for error, effect, layers_run, wanted, without, disabled in ranks.run(cached, entry_id, cache, before, ulysses=3):
        assert layers_run == wanted < without
        assert effect > 1e-4
        assert error <= 1e-5
        assert disabled <= 1e-5


def looking(mesh: ParallelMesh) -> tuple[float, bool]:
    """Somebody's own code around a block, which decides by what all tokens say together."""
    from tests.sharding.zoo.all import ENTRIES

    entry = ENTRIES[QWEN]
    reference, model = randomise(entry.build()), randomise(entry.build())
    seen: list[torch.Size] = []

    def wrap(block: Any) -> None:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            text, picture = original(*args, **kwargs)
            seen.append(picture.shape)
            return text, picture * float(picture.abs().amax())

        block.forward = forward

    with torch.no_grad():
        wrap(reference.transformer_blocks[1])
        wanted = first_tensor(reference(**entry.inputs()))
        parallelize(model, mesh)
        model(**entry.inputs())
        wrap(model.transformer_blocks[1])
        error = relative_error(first_tensor(model(**entry.inputs())), wanted)
    return error, seen[0] == seen[-1]


def test_code_put_around_a_block_sees_the_whole(ranks: RankPool) -> None:
    for error, alike in ranks.run(looking, ulysses=2, ring=2):
        assert error <= 1e-5
        assert alike


def skipping(mesh: ParallelMesh, entry_id: str) -> tuple[float, float]:
    """Skipped attention scores (perturbed-attention guidance), which catch torch's own attention function."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    from tests.sharding.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    entry = ENTRIES[entry_id]
    reference, model = randomise(entry.build()), randomise(entry.build())
    config = LayerSkipConfig(
        indices=[1], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    with torch.no_grad():
        plain = first_tensor(reference(**entry.inputs()))
        apply_layer_skip(reference, config)
        wanted = first_tensor(reference(**entry.inputs()))
        parallelize(model, mesh)
        apply_layer_skip(model, config)
        return relative_error(first_tensor(model(**entry.inputs())), wanted), relative_error(plain, wanted)


@pytest.mark.parametrize("entry_id", ["CogView4Transformer2DModel", "PixArtTransformer2DModel"])
def test_skipped_attention_stays_skipped(ranks: RankPool, entry_id: str) -> None:
    for error, effect in ranks.run(skipping, entry_id, ulysses=2):
        assert effect > 1e-3
        assert error <= 1e-5
