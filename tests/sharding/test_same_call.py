"""Ranks that do not run the same thing get an error that says what differs, and never a mixture of two pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from omni_sp import OmniSPError, ParallelMesh, parallelize
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.models import qwen_image, qwen_inputs
from tests.sharding.test_changed import add_lora

PIPELINES = [
    "QwenImagePipeline",
    "FluxPipeline",
    "WanPipeline",
    "StableDiffusion3Pipeline",
    "ZImagePipeline",
]


def unseeded(pipe: Any, call: dict[str, Any], rank: int) -> None:
    """No generator, after one rank drew a number of its own."""
    torch.manual_seed(1234)
    if rank == 0:
        torch.rand(1)


def seeded_by_rank(pipe: Any, call: dict[str, Any], rank: int) -> None:
    call["generator"] = torch.Generator().manual_seed(rank)


def stochastic(pipe: Any, call: dict[str, Any], rank: int) -> None:
    """The same initial noise; the scheduler draws from the global generator between the steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**{**config, "stochastic_sampling": True})
    call["generator"] = torch.Generator().manual_seed(7)
    torch.manual_seed(rank)


def other_prompt(pipe: Any, call: dict[str, Any], rank: int) -> None:
    """Another text of the same length."""
    call["generator"] = torch.Generator().manual_seed(7)
    embeds = call["prompt_embeds"]
    turned = [one.roll(rank, 0) for one in embeds] if isinstance(embeds, list) else embeds.roll(rank, 1)
    call["prompt_embeds"] = turned


VARIANTS: dict[str, tuple[Callable[..., None], str]] = {
    "unseeded": (unseeded, "Only the initial noise differs: give every rank a generator of the same seed"),
    "by rank": (seeded_by_rank, "Only the initial noise differs: give every rank a generator of the same seed"),
    "stochastic": (stochastic, "the scheduler or a callback drew random numbers between the steps"),
    "prompt": (other_prompt, "encoder_hidden_states on ranks [1]"),
}


def draw(mesh: ParallelMesh, entry_id: str, variant: str) -> str:
    from tests.pipelines.zoo.all import ENTRIES

    warnings.simplefilter("ignore")
    pipe, call = ENTRIES[entry_id].build(), ENTRIES[entry_id].arguments()
    pipe.set_progress_bar_config(disable=True)
    VARIANTS[variant][0](pipe, call, mesh.rank)
    parallelize(pipe, mesh)
    try:
        pipe(**{"num_inference_steps": 3, "output_type": "latent", "return_dict": False} | call)
    except OmniSPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


OTHERS = zip(PIPELINES[1:], ["prompt", "unseeded", "stochastic", "by rank"], strict=True)


@pytest.mark.parametrize(("entry_id", "variant"), [*((PIPELINES[0], variant) for variant in VARIANTS), *OTHERS])
def test_a_pipeline_that_differs_between_ranks_is_refused(ranks: RankPool, entry_id: str, variant: str) -> None:
    for message in ranks.run(draw, entry_id, variant, ulysses=2):
        assert message.startswith("ShardingError: the ranks call ")
        assert VARIANTS[variant][1] in message
        assert "[1]" in message


def lora_on_one(model: Any, inputs: dict[str, Any], rank: int) -> None:
    if rank == 1:
        add_lora(model)


def scaled_lora(model: Any, inputs: dict[str, Any], rank: int) -> None:
    add_lora(model)
    model.set_adapters("style", 1.0 + rank)


def other_lora(model: Any, inputs: dict[str, Any], rank: int) -> None:
    add_lora(model)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).mul_(1 + rank)


def hook_on_one(model: Any, inputs: dict[str, Any], rank: int) -> None:
    if rank == 0:
        model.transformer_blocks[1].attn.register_forward_hook(lambda *_: None)


def other_attribute(model: Any, inputs: dict[str, Any], rank: int) -> None:
    model.norm_out.norm.eps = 1e-6 * (1 + rank)


def other_buffer(model: Any, inputs: dict[str, Any], rank: int) -> None:
    model.norm_out.register_buffer("shift", torch.full((8,), float(rank)))


def one_masked_token(model: Any, inputs: dict[str, Any], rank: int) -> None:
    inputs.update(qwen_inputs(lengths=(13, 7)))
    inputs["encoder_hidden_states_mask"][1, 6] = rank == 0


def longer_text(model: Any, inputs: dict[str, Any], rank: int) -> None:
    inputs.update(qwen_inputs(text=13 + rank))


def missing_input(model: Any, inputs: dict[str, Any], rank: int) -> None:
    if rank == 1:
        inputs["guidance"] = None


def rounded(model: Any, inputs: dict[str, Any], rank: int) -> None:
    inputs["hidden_states"] *= 1 + 1e-6 * rank


CALLS: dict[Callable[..., None], str] = {
    lora_on_one: "different versions of QwenImageTransformer2DModel",
    scaled_lora: "linear_1.adapters: rank 0: {'style': 2.0} [['style'], False, []], rank 1: {'style': 4.0}",
    other_lora: "weights: rank 0: checksum",
    hook_on_one: "hooks or code of others in: rank 0: transformer_blocks.1.attn, rank 1: no module",
    other_attribute: "norm_out.norm.eps: rank 0: 1e-06, rank 1: 2e-06",
    other_buffer: "weights: rank 0: checksum",
    one_masked_token: "encoder_hidden_states_mask on ranks [1]",
    longer_text: "encoder_hidden_states: rank 0: (1, 13, 24) of torch.float32, rank 1: (1, 14, 24)",
    missing_input: "guidance: rank 0: nothing, rank 1: None",
    rounded: "no error",
}


def call_once(mesh: ParallelMesh, change: Callable[..., None]) -> str:
    model, inputs = randomise(qwen_image()), qwen_inputs()
    change(model, inputs, mesh.rank)
    parallelize(model, mesh)
    try:
        with torch.no_grad():
            model(**inputs)
    except OmniSPError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("change", CALLS, ids=lambda change: change.__name__)
def test_a_transformer_that_differs_between_ranks_is_refused(ranks: RankPool, change: Any) -> None:
    for message in ranks.run(call_once, change, ulysses=2):
        assert CALLS[change] in message


def exchanges(mesh: ParallelMesh, check: bool) -> list[int]:
    """How many exchanges of integers each of some forwards makes, beyond those of the second one of its shape."""
    mesh = ParallelMesh(mesh.config, ranks=mesh.ranks, check=check, shared_memory=mesh.sequence.channel is not None)
    model, inputs = randomise(qwen_image()), qwen_inputs()
    parallelize(model, mesh)
    counts = []
    with torch.no_grad():
        model(**inputs)
        for _ in range(2, 33):
            mesh.sequence.traffic.reset()
            model(**inputs)
            counts.append(mesh.sequence.traffic.calls.get("gather_ints", 0))
    return counts


def test_few_forwards_of_many_are_compared(ranks: RankPool) -> None:
    for counts in ranks.run(exchanges, False, ulysses=2):
        # Whether other people's code has come is compared at every one, with a message of some microseconds.
        assert {number for number, count in enumerate(counts, 2) if count > 1} == {2, 3, *range(4, 33, 4)}
        assert min(counts) == 1
    for counts in ranks.run(exchanges, True, ulysses=2):
        assert min(counts) > 1
    for counts in ranks.run(exchanges, False, ulysses=2, shared_memory=False):
        assert {number for number, count in enumerate(counts, 2) if count} == {2, 3, *range(4, 33, 4)}


def made_for_inference(mesh: ParallelMesh) -> list[float]:
    """Errors of a model that was made in inference mode, whose weights do not count who wrote to them."""
    with torch.inference_mode():
        model = randomise(qwen_image())
        wanted = model(**qwen_inputs())[0]
        handle = parallelize(model, mesh)
        errors = [relative_error(model(**qwen_inputs())[0], wanted) for _ in range(2)]
        handle.remove()
    return errors


def test_a_model_that_was_made_in_inference_mode(ranks: RankPool) -> None:
    for errors in ranks.run(made_for_inference, ulysses=2):
        assert max(errors) <= 1e-5
