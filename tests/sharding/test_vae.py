"""Autoencoders over several ranks against one process: decode and encode, from end to end, through their own code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding import shard_vae
from omni_sp.testing.live_bytes import LiveBytes
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.vaes import BY_ID, NOT_HERE, draw
from tests.thorough import THOROUGH, in_turns

LAYOUTS = [(2, 1), (1, 3), (2, 2)]
# One of each kind; OMNI_SP_THOROUGH=1 tries every class on every layout.
SOME = (
    "AutoencoderKL",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderDC shuffling",
    "AutoencoderKLKVAE",
    "AutoencoderOobleck",
)
NAMES = list(BY_ID) if THOROUGH else list(SOME)
RUNS = in_turns(NAMES, LAYOUTS)


def numbers_of(output: Any) -> torch.Tensor:
    """The picture, or what a distribution of latents is made of."""
    if isinstance(output, torch.Tensor):
        return output
    latents = getattr(output, "latent_dist", None)
    if latents is None:
        found: torch.Tensor = output[0]
        return found
    return latents.parameters if hasattr(latents, "parameters") else latents.mean  # type: ignore[no-any-return]


def both(mesh: ParallelMesh, name: str, dtype: torch.dtype, rows: int | None = None) -> dict[str, dict[str, Any]]:
    """For each method: the error of the ranks and of one process in this dtype, and what was gathered."""
    warnings.simplefilter("ignore")  # of diffusers, about what its own autoencoders use
    entry = BY_ID[name]
    exact, vae = entry.build(), entry.build().to(dtype)
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for method, (argument, options) in entry.calls().items():
            if rows is not None:
                factor = argument.shape[-2] // 7
                argument = argument[..., : rows * factor, : rows * factor]
            wanted = numbers_of(getattr(exact, method)(argument, **options))
            own = numbers_of(getattr(vae, method)(argument.to(dtype), **options))
            handle = shard_vae(vae, mesh)
            shared = numbers_of(getattr(vae, method)(argument.to(dtype), **options))
            handle.remove()
            after = numbers_of(getattr(vae, method)(argument.to(dtype), **options))
            found[method] = {
                "error": relative_error(shared, wanted),
                "own": relative_error(own, wanted),
                "restored": torch.equal(own, after) and type(shared) is torch.Tensor and method not in vars(vae),
                "gathers": dict(handle.gathers),
                "shared": handle.num_shared,
            }
    return found


@pytest.mark.parametrize(("name", "layout"), RUNS, ids=str)
def test_fp32_equals_one_process(ranks: RankPool, name: str, layout: tuple[int, int]) -> None:
    for answer in ranks.run(both, name, torch.float32, ulysses=layout[0], ring=layout[1]):
        for found in answer.values():
            assert found["error"] <= 1e-5
            assert found["restored"]
            assert found["shared"] == 1
            assert found["gathers"].keys() <= BY_ID[name].gathers


# On CPUs torch cannot pool in three dims in bfloat16.
@pytest.mark.parametrize("name", [name for name in NAMES if "Cosmos" not in name] if THOROUGH else SOME[:2])
def test_bf16_is_as_good_as_one_process(ranks: RankPool, name: str) -> None:
    for answer in ranks.run(both, name, torch.bfloat16, ring=3):
        for found in answer.values():
            assert found["error"] <= 1.5 * found["own"]
            assert found["restored"]


@pytest.mark.parametrize("name", [name for name in NAMES if not BY_ID[name].is_sound] if THOROUGH else SOME[:1])
def test_a_rank_may_have_no_row(ranks: RankPool, name: str) -> None:
    """Three rows of latents on four ranks. Where rows are seen as pairs, there have to be as many as ranks."""
    for answer in ranks.run(both, name, torch.float32, 3, ulysses=2, ring=2):
        for found in answer.values():
            assert found["error"] <= 1e-5
            assert found["gathers"].keys() <= BY_ID[name].gathers | {"aten.view.default"}


def test_every_class_is_here() -> None:
    import diffusers

    named = {name for name in dir(diffusers) if name.startswith("AutoencoderKL") or name == "AutoencoderDC"}
    assert named - NOT_HERE.keys() <= {vae.class_name for vae in BY_ID.values()}
    assert not NOT_HERE.keys() & {vae.class_name for vae in BY_ID.values()}


def larger_vae() -> Any:
    from diffusers import AutoencoderKL

    channels = (16, 32, 32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return randomise(AutoencoderKL(block_out_channels=channels, norm_num_groups=8, latent_channels=4, **blocks))


def peak_bytes(mesh: ParallelMesh, method: str, dtype: torch.dtype) -> tuple[int, int]:
    """The most bytes that were alive in one process, and on this rank."""
    vae = larger_vae().to(dtype)
    argument = draw(1, (1, 4, 64, 60) if method == "decode" else (1, 3, 256, 240)).to(dtype)

    def peak(call: Callable[..., Any]) -> int:
        with LiveBytes() as live:
            call(argument)
        return int(live.peak)

    with torch.no_grad():
        whole = peak(getattr(vae, method))
        shard_vae(vae, mesh)
        return whole, peak(getattr(vae, method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["decode", "encode"])
def test_each_rank_needs_its_part_of_the_memory(ranks: RankPool, method: str, dtype: torch.dtype) -> None:
    for whole, part in ranks.run(peak_bytes, method, dtype, ulysses=2):
        assert part <= 1.1 * whole / 2


def odd_calls(mesh: ParallelMesh) -> dict[str, Any]:
    """What is left whole, what is refused, and a batch in slices."""
    vae, latents = BY_ID["AutoencoderKL"].build(), draw(1, (2, 4, 7, 6))
    found: dict[str, Any] = {}

    def difference(call: Callable[[], Any], handle: Any) -> tuple[float, int, list[str]]:
        handle.reset_counts()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            result = call()
        messages = [str(one.message) for one in caught if "AutoencoderKL" in str(one.message)]
        return relative_error(numbers_of(result), wanted), handle.num_shared, messages

    with torch.no_grad():
        wanted = vae.decode(latents).sample
    handle = shard_vae(vae, mesh)
    found["by name"] = difference(lambda: vae.decode(z=latents), handle)
    found["as a tuple"] = difference(lambda: vae.decode(latents, return_dict=False), handle)
    vae.enable_slicing()
    found["in slices"] = difference(lambda: vae.decode(latents), handle)
    vae.disable_slicing()
    vae.enable_tiling()
    found["tiled"] = difference(lambda: vae.decode(latents), handle)
    found["tiled again"] = difference(lambda: vae.decode(latents), handle)
    vae.disable_tiling()
    found["untiled"] = difference(lambda: vae.decode(latents), handle)
    if mesh.rank == 0:
        with handle.alone():
            found["alone"] = difference(lambda: vae.decode(latents), handle)
    attempts: dict[str, Callable[[], Any]] = {
        "twice": lambda: shard_vae(vae, mesh),
        "copied": lambda: copy.deepcopy(vae),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ShardingError as error:
            found[name] = str(error)
    vae.decoder.mid_block.compile(backend="eager")
    found["compiled"] = difference(lambda: vae.decode(latents), handle)
    handle.remove()
    found["left behind"] = [name for name in vars(vae) if name in ("decode", "encode", "_omni_sp_handle")]
    return found


def test_odd_calls(ranks: RankPool) -> None:
    first, second = ranks.run(odd_calls, ulysses=2)
    for name in ("by name", "as a tuple", "in slices", "untiled"):
        assert first[name][:2] == (pytest.approx(0, abs=1e-5), 1), name
    assert first["in slices"][0] <= 1e-5
    for name in ("tiled", "tiled again", "alone"):
        assert first[name][:2] == (0.0, 0), name
    (message,) = first["tiled"][2]
    assert "AutoencoderKL.decode() runs whole on each rank, because its tiling is enabled" in message
    assert not first["tiled again"][2]
    assert not second["tiled"][2]
    assert "parallelized already" in first["twice"]
    assert "a copy of it would not be" in first["copied"]
    assert first["compiled"][:2] == (pytest.approx(0, abs=1e-4), 0)
    assert not first["left behind"]


def other_latents(mesh: ParallelMesh) -> str:
    """What is said where each rank has its own."""
    vae = BY_ID["AutoencoderKL"].build()
    shard_vae(vae, mesh)
    try:
        with torch.no_grad():
            vae.decode(draw(mesh.rank, (1, 4, 7, 6)))
    except ShardingError as error:
        return str(error)
    return ""


def test_ranks_that_decode_something_else_are_named(ranks: RankPool) -> None:
    for said in ranks.run(other_latents, ulysses=2):
        assert "the ranks call AutoencoderKL with different numbers than rank 0: z on ranks [1]" in said


def tiled_by_one(mesh: ParallelMesh) -> str:
    """What is said where one rank alone enables tiling; then all ranks decode together again."""
    vae = BY_ID["AutoencoderKL"].build()
    latents = draw(1, (1, 4, 7, 6))
    with torch.no_grad():
        wanted = vae.decode(latents).sample
        handle = shard_vae(vae, mesh)
        if mesh.rank == 1:
            vae.enable_tiling()
        with pytest.raises(ShardingError) as error:
            vae.decode(latents)
        vae.disable_tiling()
        assert relative_error(vae.decode(latents).sample, wanted) <= 1e-5
    handle.remove()
    return str(error.value)


def test_a_vae_that_one_rank_would_run_whole(ranks: RankPool) -> None:
    for said in ranks.run(tiled_by_one, ulysses=2):
        assert "the ranks would run AutoencoderKL.decode() in different ways" in said
        assert "rank 0: nothing, rank 1: its tiling is enabled" in said


def other_weights(mesh: ParallelMesh) -> list[str]:
    """What is said where one rank alone writes to a weight, and where it loads others; then all decode together."""
    vae, latents = BY_ID["AutoencoderKL"].build(), draw(1, (1, 4, 7, 6))
    weights, said = copy.deepcopy(vae.state_dict()), []
    with torch.no_grad():
        wanted = vae.decode(latents).sample
        shard_vae(vae, mesh)
        changes: list[Callable[[], Any]] = [
            lambda: vae.decoder.conv_out.weight.mul_(2),
            lambda: vae.load_state_dict({name: 1.1 * x for name, x in weights.items()}),
            lambda: vae.post_quant_conv.to(torch.bfloat16),
        ]
        for change in changes:
            if mesh.rank == 1:
                change()
            with pytest.raises(ShardingError) as error:
                vae.decode(latents)
            said.append(str(error.value))
            vae.float().load_state_dict(weights)
        assert relative_error(vae.decode(latents).sample, wanted) <= 1e-5
    return said


def test_a_vae_whose_weights_are_others_on_one_rank(ranks: RankPool) -> None:
    for said in ranks.run(other_weights, ulysses=2):
        assert len(said) == 3
        for text in said:
            assert "the ranks would run AutoencoderKL.decode() with different weights: rank 0: checksum" in text
            assert text.endswith("Every rank must load the same weights into it")
