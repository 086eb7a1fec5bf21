"""One rank alone replaces or compiles a component, or hooks a model: all ranks raise an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.errors import ShardingError
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import shapes_folder
from omni_sp.sharding.lazy import full_tensors
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.thorough import THOROUGH

CALL = {"prompt": "a red circle", "negative_prompt": "a star", "true_cfg_scale": 2.0, "height": 32, "width": 48}
STEPS = 5
LATE = 3
"""The step after which something changes in the middle: the next forwards compare no inputs."""


def other_encoder(pipe: Any, other: Any) -> None:
    pipe.text_encoder = other.text_encoder


def compiled_encoder(pipe: Any, other: Any) -> None:
    pipe.text_encoder.compile(backend="eager")


def wrapped_encoder(pipe: Any, other: Any) -> None:
    pipe.text_encoder = torch.nn.Sequential(pipe.text_encoder)


def other_vae(pipe: Any, other: Any) -> None:
    pipe.vae = other.vae


def other_transformer(pipe: Any, other: Any) -> None:
    pipe.transformer = other.transformer


def hooked_block(pipe: Any, other: Any) -> None:
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *_: None)


def wrapped_forward(pipe: Any, other: Any) -> None:
    block = pipe.transformer.transformer_blocks[0]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs)


def other_scaling(pipe: Any, other: Any) -> None:
    """Nobody's code, and a model that is another one."""
    pipe.transformer.transformer_blocks[0].attn.processor = other.transformer.transformer_blocks[0].attn.processor
    pipe.transformer.norm_out.norm.eps *= 2


COMPONENTS = "components of the pipeline that were replaced or compiled: rank 0: none, rank 1: "
BEFORE: dict[Callable[..., None], str] = {
    other_encoder: f"{COMPONENTS}text_encoder (now another Qwen2_5_VLForConditionalGeneration)",
    compiled_encoder: f"{COMPONENTS}text_encoder (compiled)",
    wrapped_encoder: f"{COMPONENTS}text_encoder (now another Sequential)",
    other_vae: f"{COMPONENTS}vae (now another AutoencoderKLQwenImage)",
}
BETWEEN: dict[Callable[..., None], str] = {
    hooked_block: "hooks or code of others in: rank 0: no module, rank 1: transformer_blocks.1",
    wrapped_forward: "hooks or code of others in: rank 0: no module, rank 1: transformer_blocks.0",
    other_vae: f"{COMPONENTS}vae (now another AutoencoderKLQwenImage)",
    other_scaling: "norm_out.norm.eps: rank 0: ",
    other_transformer: "the ranks ",
}
OF_BRANCHES = {
    hooked_block: "hooks or code of others in: rank 0: no module, rank 1: code of others runs around a QwenImage",
    wrapped_forward: "hooks or code of others in: rank 0: no module, rank 1: code of others runs around a QwenImage",
}
"""What groups of ranks say of changes between two steps, before a rank of theirs would compute them."""


def loaded() -> Any:
    pipe = load_pipeline(resolve_model(shapes_folder()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def unused() -> Any:
    """A pipeline that is never drawn with, of which changes take parts."""
    return loaded()


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    call = {**CALL, "num_inference_steps": STEPS, "output_type": "pt", "return_dict": False, "generator": generator}
    result: torch.Tensor = full_tensors(pipe(**{**call, **options}), "a test")[0]
    return result


def message_of(mesh: ParallelMesh, change: Callable[..., None], *, between: bool) -> str:
    """What the ranks say of a change on rank 1, before a call or between two of its steps."""
    pipe, other = loaded(), unused()
    parallelize(pipe, mesh)

    def on_step_end(_pipe: Any, step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == LATE and mesh.rank == 1:
            change(pipe, other)
        return given

    if not between and mesh.rank == 1:
        change(pipe, other)
    try:
        draw(pipe, **({"callback_on_step_end": on_step_end} if between else {}))
    except ShardingError as error:
        return str(error)
    return "no error"


def messages(mesh: ParallelMesh) -> list[tuple[str, str, str]]:
    between_steps = BETWEEN | OF_BRANCHES if mesh.cfg.size > 1 else BETWEEN
    cases = [(False, *case) for case in BEFORE.items()] + [(True, *case) for case in between_steps.items()]
    return [(change.__name__, wanted, message_of(mesh, change, between=between)) for between, change, wanted in cases]


LAYOUTS = [(2, 1, 1), (1, 1, 2)]


@pytest.mark.parametrize(("ulysses", "ring", "cfg"), [*LAYOUTS, (2, 2, 1), (2, 1, 2)] if THOROUGH else LAYOUTS)
def test_what_one_rank_alone_changes_is_named(ranks: RankPool, ulysses: int, ring: int, cfg: int) -> None:
    for answers in ranks.run(messages, ulysses=ulysses, ring=ring, cfg=cfg, vae_parallel=True):
        for change, expected, said in answers:
            assert expected in said, (change, said)


def changed_on_all(mesh: ParallelMesh) -> tuple[list[float], bool]:
    """Errors of pictures after changes on all ranks, and without an encoder on one; what remove() leaves."""
    pipe, other = loaded(), loaded()
    embeds, mask = other.encode_prompt("a red circle")
    encoded = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "prompt_embeds_mask": mask}
    encoded |= {"negative_prompt_embeds": embeds.roll(1, 1), "negative_prompt_embeds_mask": mask}
    wanted, wanted_of_encoded = draw(other), draw(other, **encoded)
    handle, errors = parallelize(pipe, mesh), []
    encoder = pipe.text_encoder
    if mesh.rank == 1:
        pipe.text_encoder = None
    errors.append(relative_error(draw(pipe, **encoded), wanted_of_encoded))
    pipe.text_encoder = encoder
    for change in (other_encoder, other_vae):
        change(pipe, other)
        errors.append(relative_error(draw(pipe), wanted))
    handle.remove()
    return errors, vars(pipe).keys().isdisjoint({"check_inputs", "encode_prompt"})


def test_what_all_ranks_change_is_drawn_right(ranks: RankPool) -> None:
    for errors, is_restored in ranks.run(changed_on_all, ulysses=2, vae_parallel=True):
        assert max(errors) <= 1e-5
        assert is_restored
