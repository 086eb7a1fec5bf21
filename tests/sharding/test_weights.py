"""Weights of which each rank keeps a part: the same results, the bytes on each rank, and whoever else reads them."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.collectives import require_equal
from omni_sp.errors import ConfigError, ShardingError, UnsupportedModelError
from omni_sp.pipelines.load import load_pipeline, resolve_model
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL
from omni_sp.sharding import weights as sharded
from omni_sp.sharding.replay import block_lists
from omni_sp.sharding.stand_in import ShardedWeight
from omni_sp.sharding.weight_parts import leaves_of
from omni_sp.sharding.weights import held_bytes
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.library_versions import OFFLOADS_GROUPS_ON_CPU
from tests.sharding.quantised import ScaledWeight
from tests.sharding.test_changed import add_lora
from tests.sharding.test_replay import CHANGES, changed_after_recording, offloaded
from tests.sharding.zoo.all import ENTRIES
from tests.sharding.zoo.check import first_tensor
from tests.thorough import THOROUGH

FLUX, SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"


def first(model: Any, entry_id: str) -> torch.Tensor:
    with torch.inference_mode():
        return first_tensor(model(**ENTRIES[entry_id].inputs())).clone()


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def block_bytes(model: Any) -> int:
    return sum(x.nbytes for block in block_lists(model) for x in (*block.parameters(), *block.buffers()))


def whole_and_sharded(mesh: ParallelMesh, name: str, replay: bool, lora: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model = randomise(ENTRIES[name].build())
    if lora:
        add_lora(model)
    before, total, blocks = bits(model), held_bytes(model), block_bytes(model)
    ids = {path: id(x) for path, x in model.named_parameters()}
    handle = parallelize(model, plain_mesh(mesh), replay=replay)
    wanted = [first(model, name) for _ in range(3)]
    handle.remove()
    handle = parallelize(model, mesh, replay=replay)
    resting = handle.weight_bytes
    got = [first(model, name) for _ in range(3)]
    found = {
        "equal": [torch.equal(x, y) for x, y in zip(got, wanted, strict=True)],
        "resting": (resting, handle.weight_bytes),
        "expected": (total - blocks, blocks),
        "num_blocks": len(list(block_lists(model))),
        "counts": handle.blocks,
    }
    handle.remove()
    found["restored"] = same_bits(before, bits(model)) and ids == {p: id(x) for p, x in model.named_parameters()}
    found["held after"] = held_bytes(model) == total
    return found


_PLAIN: dict[Any, ParallelMesh] = {}


def plain_mesh(mesh: ParallelMesh) -> ParallelMesh:
    """The same ranks, for whole weights."""
    key = (mesh.config.ulysses_degree, mesh.config.ring_degree)
    if key not in _PLAIN:
        config = DiffusionParallelConfig(ulysses_degree=key[0], ring_degree=key[1])
        _PLAIN[key] = ParallelMesh(config, ranks=mesh.ranks)
    return _PLAIN[key]


CASES = [
    (FLUX, (2, 1), True, True),
    (FLUX, (2, 2), False, False),
    (SD3, (1, 2), True, False),
    ("WanTransformer3DModel", (3, 1), True, True),
    ("ZImageTransformer2DModel", (2, 1), True, False),
]


@pytest.mark.parametrize(("name", "layout", "replay", "lora"), CASES, ids=str)
def test_the_result_is_that_of_whole_weights(
    ranks: RankPool, name: str, layout: tuple[int, int], replay: bool, lora: bool
) -> None:
    size = layout[0] * layout[1]
    for found in ranks.run(
        whole_and_sharded, name, replay, lora, ulysses=layout[0], ring=layout[1], shard_weights=True
    ):
        assert all(found["equal"])
        assert found["restored"]
        assert found["held after"]
        assert not replay or found["counts"].replayed > 0
        rest, blocks = found["expected"]
        # Each weight begins at a multiple of 256 bytes, which is much among weights as tiny as these.
        assert found["resting"][0] == found["resting"][1]
        assert rest + blocks / size <= found["resting"][0] <= rest + blocks / size + 256 * 60 * found["num_blocks"]


WEIGHTS = ("lora", "weight", "new_data", "other_dtype", "lambda")
CHANGED = [
    number
    for number, (_, change) in enumerate(CHANGES)
    if change is not offloaded and (THOROUGH or any(word in change.__name__ for word in WEIGHTS))
]


@pytest.mark.parametrize("number", CHANGED)
def test_a_change_is_seen_at_the_next_call(ranks: RankPool, number: int) -> None:
    for error, effect, counts in ranks.run(changed_after_recording, number, ulysses=2, shard_weights=True):
        assert counts.replayed
        assert effect > 1e-4
        assert error <= 1e-5


def states_and_norms(mesh: ParallelMesh) -> dict[str, Any]:
    """What reads weights between forwards, and what it leaves."""
    model = randomise(ENTRIES[SD3].build())
    wanted, norm = copy.deepcopy(model.state_dict()), sum(x.norm() for x in model.parameters())
    output = first(model, SD3)
    handle = parallelize(model, mesh)
    sharded_output, resting = first(model, SD3), handle.weight_bytes
    weight = next(x for x in model.parameters() if type(x) is ShardedWeight)
    found = {
        "describes": (isinstance(weight, torch.nn.Parameter), weight.requires_grad, handle.weight_bytes == resting),
        "device": (model.to("cpu") is model, model.dtype, handle.weight_bytes == resting),
        "norm": torch.equal(sum(x.norm() for x in model.parameters()), norm),
    }
    first(model, SD3)
    found["released"] = handle.weight_bytes == resting
    state = model.state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    found["state"] = same_bits(state, wanted) and same_bits(torch.load(io.BytesIO(saved.getvalue())), wanted)
    found["own memory"] = len({x.untyped_storage().data_ptr() for x in state.values()}) == len(state)
    found["copy"] = torch.equal(copy.deepcopy(weight), weight)
    # What somebody holds stays whole when the weights are freed.
    found["again"] = torch.equal(first(model, SD3), sharded_output) and same_bits(state, wanted)
    model.load_state_dict({name: 2 * x for name, x in wanted.items()})
    doubled = copy.deepcopy(wanted)
    model.load_state_dict(doubled)
    found["loaded"] = torch.equal(first(model, SD3), sharded_output)
    handle.remove()
    handle.remove()
    found["removed"] = torch.equal(first(model, SD3), output) and same_bits(model.state_dict(), wanted)
    return found


def test_weights_can_be_read_between_forwards(ranks: RankPool) -> None:
    for found in ranks.run(states_and_norms, ulysses=2, ring=2, shard_weights=True):
        assert found.pop("describes") == (True, True, True)
        assert found.pop("device") == (True, torch.float32, True)
        assert all(found.values()), found


def fused(mesh: ParallelMesh) -> list[float]:
    """Errors with a LoRA that came later, was fused, and unfused."""
    reference, model = randomise(ENTRIES[SD3].build()), randomise(ENTRIES[SD3].build())
    handle = parallelize(model, mesh)
    first(model, SD3)
    errors = []
    changes: list[Callable[[Any], Any]] = [add_lora, lambda x: x.fuse_lora(), lambda x: x.unfuse_lora()]
    for change in changes:
        change(reference)
        change(model)
        errors += [relative_error(first(model, SD3), first(reference, SD3)) for _ in range(2)]
    handle.remove()
    return errors


def test_lora_comes_later_is_fused_and_unfused(ranks: RankPool) -> None:
    for errors in ranks.run(fused, ulysses=2, shard_weights=True):
        assert max(errors) <= 1e-5


def alone(mesh: ParallelMesh) -> tuple[str, str, bool]:
    """What rank 0 gets that reads a weight alone, and removes the handle alone; and whether all go on."""
    model = randomise(ENTRIES[SD3].build())
    output = first(model, SD3)
    handle = parallelize(model, mesh)
    first(model, SD3)
    messages = ["", ""]
    patience, sharded._PATIENCE_S = sharded._PATIENCE_S, 0.2
    if mesh.rank == 0:
        for number, act in enumerate([lambda: model.transformer_blocks[1].state_dict(), handle.remove]):
            try:
                act()
            except ShardingError as error:
                messages[number] = str(error)
    require_equal(mesh.world, "the ranks are elsewhere", place=1)
    sharded._PATIENCE_S = patience
    if mesh.rank == 0:  # its hooks are off; the weights are put back by the next remove()
        handle.remove()
        return messages[0], messages[1], torch.equal(first(model, SD3), output)
    handle.remove()
    return messages[0], messages[1], torch.equal(first(model, SD3), output)


def test_a_rank_that_reads_alone_does_not_hang(ranks: RankPool) -> None:
    (reads, removes, restored), other = ranks.run(alone, ulysses=2, shard_weights=True)
    for message, what in (
        (reads, "reading the weights of block 1 of SD3Transformer2DModel"),
        (removes, "remove() of the handle of SD3Transformer2DModel"),
    ):
        assert message.startswith(what)
        assert "ranks [1] did not come to it within 0.2 s: let every rank do it" in message
    assert restored
    assert other == ("", "", True)


def quantised(mesh: ParallelMesh) -> dict[str, bool]:
    model = randomise(ENTRIES[SD3].build())
    linears = [block.ff.net[2] for block in model.transformer_blocks]
    handle = parallelize(model, mesh)
    first(model, SD3)
    for linear in linears:  # whose weights are sharded just now
        linear.weight = ScaledWeight.of(linear.weight)
    late = first(model, SD3)
    handle.remove()
    parts = [x.clone() for linear in linears for x in leaves_of(linear.weight)]
    output = first(model, SD3)
    handle = parallelize(model, plain_mesh(mesh))
    wanted = [first(model, SD3) for _ in range(3)]
    linears[1].weight.scale = linears[1].weight.scale * 3  # as those who move such weights exchange their tensors
    changed = first(model, SD3)
    linears[1].weight.scale = parts[3].clone()
    found = {
        "exact": max(relative_error(x, output) for x in (late, wanted[0])) <= 1e-5,
        "replayed": all(torch.equal(x, wanted[0]) for x in wanted) and handle.blocks.replayed > 0,
        "never followed": not handle.blocks.followed,
        "seen": relative_error(changed, output) > 1e-4 and torch.equal(first(model, SD3), wanted[0]),
    }
    handle.remove()
    handle = parallelize(model, mesh)
    found["equal"] = all(torch.equal(first(model, SD3), wanted[0]) for _ in range(2)) and handle.blocks.replayed > 0
    weight: Any = linears[0].weight
    found["freed"] = type(weight) is ShardedWeight and not any(x.numel() for x in leaves_of(weight.weight))
    found["kind"] = isinstance(weight, ScaledWeight)
    handle.remove()
    handle = parallelize(model, mesh, compile={"backend": "eager"})
    compiled = [first(model, SD3) for _ in range(3)]
    found["compiled"] = handle.blocks.compiled > 0 and max(relative_error(x, output) for x in compiled) <= 1e-5
    handle.remove()
    torch.compiler.reset()
    after = [x for linear in linears for x in leaves_of(linear.weight)]
    return {**found, "restored": all(map(torch.equal, parts, after))}


def test_weights_that_are_made_of_several_tensors(ranks: RankPool) -> None:
    for found in ranks.run(quantised, ulysses=2, shard_weights=True):
        assert all(found.values()), found


def run_twice(mesh: ParallelMesh) -> list[float]:
    """Errors of a model whose first block runs twice in each forward."""
    model = randomise(ENTRIES[SD3].build())
    model.transformer_blocks.insert(0, model.transformer_blocks[0])
    wanted, errors = first(model, SD3), []
    for one in (plain_mesh(mesh), mesh):
        handle = parallelize(model, one)
        errors += [relative_error(first(model, SD3), wanted) for _ in range(3)]
        assert handle.blocks.replayed
        handle.remove()
    return [*errors, relative_error(first(model, SD3), wanted)]


def test_a_block_that_runs_twice(ranks: RankPool) -> None:
    for errors in ranks.run(run_twice, ulysses=2, shard_weights=True):
        assert max(errors) <= 1e-5


def shared_by_blocks(mesh: ParallelMesh) -> tuple[bool, bool, bool]:
    """A weight of two blocks, a memory of two weights, and one with gaps stay whole."""
    model = randomise(ENTRIES[SD3].build())
    one, two = (block.attn for block in model.transformer_blocks[:2])
    one.to_q.weight = two.to_q.weight
    both = torch.randn(2, *one.to_k.weight.shape)
    one.to_k.weight, one.to_v.weight = (torch.nn.Parameter(half) for half in both)
    two.to_k.weight = torch.nn.Parameter(torch.randn(*two.to_k.weight.shape[:1], 1).expand(two.to_k.weight.shape))
    handle = parallelize(model, plain_mesh(mesh))
    wanted = first(model, SD3)
    handle.remove()
    handle = parallelize(model, mesh)
    whole = [one.to_q.weight, two.to_q.weight, one.to_k.weight, one.to_v.weight, two.to_k.weight]
    found = (
        torch.equal(first(model, SD3), wanted),
        all(type(x) is torch.nn.Parameter for x in whole),
        type(two.to_v.weight) is ShardedWeight,
    )
    handle.remove()
    return found


def test_weights_of_which_others_hold_the_memory_stay_whole(ranks: RankPool) -> None:
    for found in ranks.run(shared_by_blocks, ulysses=2, shard_weights=True):
        assert all(found)


def together_with(mesh: ParallelMesh) -> dict[str, Any]:
    """Errors of what cannot go together, and results of what can."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}

    def refusal(**options: Any) -> str:
        try:
            parallelize(model, mesh, **options).remove()
        except (ConfigError, UnsupportedModelError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    model = randomise(ENTRIES[SD3].build())
    found["graphs"] = refusal(cuda_graphs=True)
    found["mode"] = refusal(compile="reduce-overhead")
    with torch.no_grad():
        wanted = first_tensor(model(**ENTRIES[SD3].inputs()))
        handle = parallelize(model, mesh, compile={"backend": "eager"})
        got = [first_tensor(model(**ENTRIES[SD3].inputs())) for _ in range(3)]
        found["compiled"] = handle.blocks.compiled > 0 and max(relative_error(x, wanted) for x in got) <= 1e-5
        handle.remove()
        torch.compiler.reset()
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        handle = parallelize(model, plain_mesh(mesh))
        cast = first_tensor(model(**ENTRIES[SD3].inputs()))
        handle.remove()
        handle = parallelize(model, mesh)
        got = [first_tensor(model(**ENTRIES[SD3].inputs())) for _ in range(3)]
        found["cast"] = all(torch.equal(x, cast) for x in got)
        handle.remove()
    if OFFLOADS_GROUPS_ON_CPU:
        cpu = torch.device("cpu")
        model = randomise(ENTRIES[SD3].build())
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        found["offload"] = refusal()
    model = randomise(ENTRIES[SD3].build())
    add_hook_to_module(model, ModelHook())
    found["accelerate"] = refusal()
    return found


def test_what_else_moves_weights_is_right_or_refused(ranks: RankPool) -> None:
    for found in ranks.run(together_with, ulysses=2, shard_weights=True):
        assert found["graphs"].startswith("ConfigError: cuda_graphs=True captures CUDA graphs")
        assert found["mode"].startswith("ConfigError: compile={'mode': 'reduce-overhead'} captures CUDA graphs")
        assert found["compiled"]
        assert found["cast"]
        assert "group offloading of diffusers" in found.get("offload", "group offloading of diffusers")
        assert "ModelHook of accelerate" in found["accelerate"]


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shard_weights='yes'.*: give True or False"):
        DiffusionParallelConfig(shard_weights="yes")  # type: ignore[arg-type]


def with_branches(mesh: ParallelMesh) -> tuple[bool, int, int]:
    """Whether the latents are those of whole weights, and the bytes on this rank."""
    pipe = load_pipeline(resolve_model(SHAPES_MODEL))
    pipe.set_progress_bar_config(disable=True)
    call = {**SHAPES_CALL, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    latents, held = [], []
    for config in (replace(mesh.config, shard_weights=False), mesh.config):
        handle = parallelize(pipe, ParallelMesh(config, ranks=mesh.ranks))
        latents.append(pipe("a red circle", **call, generator=torch.Generator().manual_seed(3)).images)
        held.append(handle.weight_bytes)
        handle.remove()
    return torch.equal(*latents), held[0], held[1]


def with_branches_read(mesh: ParallelMesh) -> list[bool]:
    """Whether calls are the same after all weights were read, and then some, and ranks hold their parts after each.

    One group makes the forwards between.
    """
    pipe = load_pipeline(resolve_model(SHAPES_MODEL))
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 64, "width": 64, "num_inference_steps": 1, "true_cfg_scale": 1.0, "output_type": "latent"}
    handle = parallelize(pipe, mesh)
    drawn, resting, held = [], handle.weight_bytes, []
    for count in (0, 0, None, 0, 1):
        for block in list(block_lists(pipe.transformer))[:count]:
            assert all(weight.norm().isfinite() for weight in block.parameters())
        drawn.append(pipe("a red circle", **small, generator=torch.Generator().manual_seed(3)).images)
        held.append(handle.weight_bytes)
    handle.remove()
    return [torch.equal(one, drawn[0]) and now == resting for one, now in zip(drawn, held, strict=True)]


def test_groups_that_share_branches_need_not_read_alike(ranks: RankPool) -> None:
    for equal in ranks.run(with_branches_read, cfg=2, ulysses=2, shard_weights=True):
        assert equal == [True] * 5


def test_groups_that_share_branches_hold_the_weights_once_each(ranks: RankPool) -> None:
    for equal, whole, sharded_bytes in ranks.run(with_branches, cfg=2, ulysses=2, shard_weights=True):
        assert equal
        assert sharded_bytes < 0.55 * whole
    with pytest.raises(ConfigError, match="ulysses_degree 1 × ring_degree 1 = 1 rank"):
        DiffusionParallelConfig(cfg_parallel_size=2, shard_weights=True)
