"""The branches of guidance on groups of ranks: they draw what one process draws, and share as much as they can."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from omni_sp import DiffusionParallelConfig, ParallelMesh, parallelize
from omni_sp.errors import ConfigError, ShardingError, UnsupportedModelError
from omni_sp.pipelines.branch_results import Result, exchange_results
from omni_sp.sharding.batch_rows import Item
from omni_sp.sharding.lazy import LazyRound
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import relative_error
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.branches import COUNTS, PAGE, draw_twice, page
from tests.pipelines.zoo.check import build, draw, expected_output
from tests.thorough import THOROUGH, thorough_only

# Two transformers, three branches, guidance that ends early, a guider, one call, a cache object, and rows of batches
# with residuals of a ControlNet and positions of the first row; OMNI_SP_THOROUGH=1 tries every pipeline.
SOME = (
    "WanPipeline",
    "StableDiffusion3Pipeline, skip layer guidance",
    "Lumina2Pipeline, guidance cut short",
    "HunyuanVideo15Pipeline",
    "FluxPipeline",
    "Flux2KleinKVPipeline",
    "StableDiffusion3ControlNetPipeline",
    "Flux2Pipeline",
)
NAMES = [name for name, entry in ENTRIES.items() if entry.runs_here and (THOROUGH or name in SOME)]
QWEN = "QwenImagePipeline"
Counts = dict[str, Any]


@pytest.mark.parametrize("name", NAMES)
def test_two_groups_draw_what_one_process_draws(ranks: RankPool, name: str) -> None:
    expected = expected_output(ranks, name)
    for results, counts, restored in ranks.run(draw_twice, name, cfg=2, vae_parallel=False):
        for result in results:  # kernels round a batch of another size otherwise
            assert relative_error(result, expected) <= (ENTRIES[name].error if counts["rows"] else 0.0)
        assert [counts["units"], counts["rounds"]] == COUNTS[name]
        assert restored


@pytest.mark.parametrize(
    ("name", "cfg", "ulysses", "expected_counts"),
    [
        (QWEN, 2, 2, COUNTS[QWEN]),
        (
            "StableDiffusion3Pipeline, skip layer guidance",
            2,
            2,
            COUNTS["StableDiffusion3Pipeline, skip layer guidance"],
        ),
        ("LTX2Pipeline, 2.3", 3, 1, [9, 3]),  # a step's three calls, one of them a batch, are one for each group
    ],
)
def test_with_tokens_split_and_on_three_groups(
    ranks: RankPool, name: str, cfg: int, ulysses: int, expected_counts: list[int]
) -> None:
    expected = expected_output(ranks, name)
    for results, counts, restored in ranks.run(draw_twice, name, cfg=cfg, ulysses=ulysses, vae_parallel=False):
        for result in results:
            assert relative_error(result, expected) <= (ENTRIES[name].error if ulysses > 1 else 0.0)
        assert [counts["units"], counts["rounds"]] == expected_counts
        assert restored


@thorough_only
@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_with_tokens_split(ranks: RankPool, name: str) -> None:
    """Ranks share as many calls as with whole tokens."""
    expected = expected_output(ranks, name)
    for results, counts, restored in ranks.run(draw_twice, name, cfg=2, ulysses=2, vae_parallel=False):
        for result in results:
            assert relative_error(result, expected) <= ENTRIES[name].error
        assert [counts["units"], counts["rounds"]] == COUNTS[name]
        assert restored


@thorough_only
@pytest.mark.parametrize("name", [name for name in NAMES if COUNTS[name][0] >= 9])
def test_every_pipeline_of_three_calls_or_rows_a_step_on_three_groups(ranks: RankPool, name: str) -> None:
    expected = expected_output(ranks, name)
    for results, counts, restored in ranks.run(draw_twice, name, cfg=3, vae_parallel=False):
        for result in results:
            assert relative_error(result, expected) <= (ENTRIES[name].error if counts["rows"] else 0.0)
        units, rounds = COUNTS[name]
        # Rows are dealt evenly: four of a step need two rounds on three groups too.
        assert -(-counts["units"] // 3) <= counts["rounds"]
        if counts["units"] == units:
            assert counts["rounds"] <= rounds
        elif counts["rows"]:  # calls that two groups took whole, one each, are shared by rows among three
            assert counts["units"] == counts["rows"] > units
            assert 3 * counts["rounds"] <= 2 * counts["units"]
        else:  # as many calls as groups: each takes a whole one
            assert counts["units"] == 3 * counts["rounds"]
        assert restored


def qwen(steps: int = 4) -> tuple[Any, dict[str, Any]]:
    return build(QWEN, torch.float32), {**ENTRIES[QWEN].arguments(), "num_inference_steps": steps}


def drawn_with(mesh: ParallelMesh, arguments: dict[str, Any], pipe: Any) -> tuple[bool, Counts]:
    """Whether two groups draw the bits of one process, and the counts of the second time."""
    expected = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    assert handle.branches is not None
    try:
        equal = torch.equal(draw(pipe, arguments), expected)
        handle.reset_counts()
        equal &= torch.equal(draw(pipe, arguments), expected)
    finally:
        handle.remove()
    return equal, handle.branches.counts.as_dict(mesh.cfg.size)


def with_callbacks(mesh: ParallelMesh) -> tuple[bool, Counts]:
    """A callback reads on rank 0 alone what it gets, and returns latents of its own."""
    pipe, arguments = qwen()
    seen = []

    def callback(_pipe: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if mesh.rank == 0:
            seen.append(float(given["latents"].abs().sum()))
        return {"latents": given["latents"] * 0.9}

    found = drawn_with(mesh, {**arguments, "callback_on_step_end": callback, "output_type": "latent"}, pipe)
    assert len(seen) == (12 if mesh.rank == 0 else 0)
    return found


def with_a_step_cache(mesh: ParallelMesh, has_context: bool) -> tuple[bool, Counts]:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    pipe, arguments = qwen(8)
    # Results that are kept from one text to another must be of one length.
    arguments |= {f"negative_{name}": arguments[name].flip(0) for name in ("prompt_embeds", "prompt_embeds_mask")}
    plain = draw(pipe, arguments)
    config: Any = FirstBlockCacheConfig(threshold=5.0)
    if not has_context:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
        )
    pipe.transformer.enable_cache(config)
    try:
        found = drawn_with(mesh, arguments, pipe)
        assert not torch.equal(draw(pipe, arguments), plain), "the cache does nothing"
    finally:
        pipe.transformer.disable_cache()
    return found


def with_a_hook_of_others(mesh: ParallelMesh) -> tuple[bool, Counts]:
    pipe, arguments = qwen()
    outputs: list[Any] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *given: outputs.append(given))
    try:
        return drawn_with(mesh, arguments, pipe)
    finally:
        hook.remove()


def with_a_copied_scheduler(mesh: ParallelMesh) -> tuple[bool, Counts]:
    """A scheduler that was copied while it was watched steps itself, and ends the round as well."""
    pipe, arguments = qwen()
    handle = parallelize(pipe, mesh)
    draw(pipe, arguments)
    copied = copy.deepcopy(pipe.scheduler)
    assert copied.step.__self__ is copied
    handle.remove()
    return drawn_with(mesh, arguments, pipe)


@pytest.mark.parametrize(
    ("case", "args", "units", "rounds", "note"),
    [
        (with_callbacks, (), 8, 4, None),
        (with_a_copied_scheduler, (), 8, 4, None),
        (with_a_step_cache, (True,), 16, 8, None),
        (with_a_step_cache, (False,), 16, 16, "found nothing to share: a step cache keeps results without a context"),
        (with_a_hook_of_others, (), 8, 8, "found nothing to share: code of others runs around a QwenImageTransformer"),
    ],
    ids=["callbacks", "copied scheduler", "step cache with context", "without context", "hook"],
)
def test_what_people_add(ranks: RankPool, case: Any, args: Any, units: int, rounds: int, note: str | None) -> None:
    for equal, counts in ranks.run(case, *args, cfg=2, vae_parallel=False):
        assert equal
        assert (counts["units"], counts["rounds"]) == (units, rounds)
        assert (counts["note"] or "").find(note or "") >= 0
        assert (counts["note"] is None) == (note is None)


def batches(mesh: ParallelMesh, cases: list[tuple[int, bool]]) -> list[tuple[float, Counts]]:
    """Batches of so many prompts, with guidance in the same batch or without."""
    name, found = "StableDiffusion3Pipeline", []
    pipe = build(name, torch.float32)
    for prompts, is_guided in cases:
        rows = torch.arange(prompts) % 2
        given = {key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in ENTRIES[name].arguments().items()}
        given |= {"guidance_scale": 3.0 if is_guided else 0.0, "num_inference_steps": 2}
        expected = draw(pipe, given)
        handle = parallelize(pipe, mesh)
        assert handle.branches is not None
        errors = []
        for _ in range(2):
            handle.reset_counts()
            errors.append(relative_error(draw(pipe, given), expected))
        found.append((max(errors), handle.branches.counts.as_dict(mesh.cfg.size)))
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("cfg", "cases", "expected"),
    [
        (2, [(3, False), (1, False)], [(6, 4, 6, None), (2, 2, 0, "a step calls the transformer once")]),
        (3, [(1, True)], [(4, 2, 4, None)]),  # one group has no row
    ],
)
def test_uneven_rows_of_batches(ranks: RankPool, cfg: int, cases: Any, expected: Any) -> None:
    for found in ranks.run(batches, cases, cfg=cfg, vae_parallel=False):
        for (error, counts), (units, rounds, rows, note) in zip(found, expected, strict=True):
            assert error <= 1e-5
            assert (counts["units"], counts["rounds"], counts["rows"]) == (units, rounds, rows)
            assert (counts["note"] or "").endswith(note or "")


def with_taylor_factors(mesh: ParallelMesh, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Errors of ranks, and of one process whose prompt differs in the last bits, where a step cache extrapolates."""
    from diffusers import TaylorSeerCacheConfig

    pipe, arguments = qwen(8)
    plain = draw(pipe, arguments)
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=dtype)
    pipe.transformer.enable_cache(config)
    try:
        expected = draw(pipe, arguments)
        assert relative_error(plain, expected) > 1e-3, "the cache does nothing"
        others = [{**arguments, "prompt_embeds": arguments["prompt_embeds"] * (1 + x)} for x in (1e-7, -1e-7)]
        alone = [relative_error(draw(pipe, one), expected) for one in others]
        handle = parallelize(pipe, mesh)
        errors = [relative_error(draw(pipe, arguments), expected) for _ in range(2)]
        handle.remove()
    finally:
        pipe.transformer.disable_cache()
    return errors, alone


@thorough_only
@pytest.mark.parametrize("ulysses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_that_rounds_what_it_keeps(ranks: RankPool, dtype: torch.dtype, ulysses: int) -> None:
    """A number whose last bit differs may round to another one in bfloat16: on ranks, and in one process as much."""
    for errors, alone in ranks.run(with_taylor_factors, dtype, cfg=2, ulysses=ulysses, vae_parallel=False):
        if ulysses == 1:  # the very kernels of one process
            assert errors == [0.0, 0.0]
        elif dtype == torch.float32:
            assert max(errors, default=1) <= 1e-6
        else:
            assert max(errors) <= 10 * max(alone)


def exchanged(mesh: ParallelMesh) -> None:
    """Of one round: calls by rows, with two tensors, one of them along its second dim, or a list; and a whole one."""
    group, axis, number = mesh.cfg.rank, mesh.cfg, torch.arange(24.0)
    first, second, whole = number.view(4, 6), number.view(3, 4, 2).int(), number.view(6, 4).t()
    lengths: list[int] = [3, 0, 1]
    start = sum(lengths[:group])
    results: list[Result] = []
    round_ = LazyRound(lambda _reason: exchange_results(results, axis))
    for tensors, counts, places in (((first, second), lengths, [0, 1]), ((whole,), [0, 1, 0], None)):
        lazies = [round_.tensor(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        results.append(Result(counts, lazies, places))
        if counts[group]:
            results[-1].tensors = [
                x if places is None else x.narrow(places[index], start, counts[group])
                for index, x in enumerate(tensors)
            ]
    items = [whole[row] for row in range(4)]
    results.append(Result(lengths, [round_.tensor(x.shape, x.stride(), x.dtype, x.device) for x in items]))
    results[-1].places = [Item(row) for row in range(4)]
    results[-1].tensors = items[start : start + lengths[group]]
    sums = results[0].lazies[0] + 1, results[0].lazies[1] * 2
    given: list[Any] = [*sums, *results[1].lazies, *results[2].lazies]
    for lazy, plain in zip(given, (first + 1, second * 2, whole, *items), strict=True):
        assert torch.equal(lazy.full("the test"), plain)
        assert lazy.full("the test").stride() == plain.stride()
    if group == 2:  # a row less than promised
        results[0].tensors[1] = results[0].tensors[1][:, :0]
    with pytest.raises(ShardingError, match=r"ranks \[2\] got results of other shapes from a transformer call") as told:
        exchange_results(results, axis)
    assert not told.value.follows


def test_rows_and_whole_results_of_one_round(ranks: RankPool) -> None:
    ranks.run(exchanged, cfg=3)


def with_a_lora(mesh: ParallelMesh) -> None:
    """The strength of an adapter is an argument of each call."""
    from peft import LoraConfig

    pipe, arguments = qwen(2)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora_" in name:
                weight.normal_(generator=generator)
    drawn = []
    try:
        for scale in (0.2, 1.0):
            arguments["attention_kwargs"] = {"scale": scale}
            drawn.append(draw(pipe, arguments))
            equal, counts = drawn_with(mesh, arguments, pipe)
            assert equal
            assert (counts["units"], counts["rounds"]) == (4, 2)
    finally:
        pipe.transformer.delete_adapters("default")
        build.cache_clear()
    assert not torch.equal(*drawn), "the strength of the adapter does nothing"


def with_an_interval(mesh: ParallelMesh) -> None:
    """Guidance of some steps alone: two calls there, else one."""
    from diffusers import ClassifierFreeGuidance

    name = "HunyuanVideo15Pipeline"
    pipe = build(name, torch.float32)
    guider = pipe.guider
    pipe.guider = ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75)
    try:
        equal, counts = drawn_with(mesh, {**ENTRIES[name].arguments(), "num_inference_steps": 4}, pipe)
    finally:
        pipe.guider = guider
    assert equal
    assert (counts["steps"], counts["units"], counts["rounds"]) == (4, 6, 4)


def with_texts_of_one_length(mesh: ParallelMesh) -> None:
    """The first step of all has a call for each group too, though nobody knows yet: no rows are shared."""
    pipe, arguments = qwen(2)
    arguments |= {f"negative_{name}": arguments[name].flip(0) for name in ("prompt_embeds", "prompt_embeds_mask")}
    expected = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    assert handle.branches is not None
    assert torch.equal(draw(pipe, arguments), expected)
    assert (handle.branches.counts.rows, handle.branches.counts.units, handle.branches.counts.rounds) == (0, 4, 3)
    handle.remove()


@pytest.mark.parametrize("case", [with_a_lora, with_an_interval, with_texts_of_one_length])
def test_calls_that_differ_from_step_to_step(ranks: RankPool, case: Any) -> None:
    ranks.run(case, cfg=2, vae_parallel=False)


def left_in_the_middle(mesh: ParallelMesh) -> tuple[bool, list[Any]]:
    """Calls that end within a step: on all ranks while a result is awaited, at the first call of one, and apart."""
    pipe, arguments = qwen(3)
    expected = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    branches = handle.branches
    assert branches is not None
    told: list[Any] = []

    def left_at(number: int, rank: int | None, error: type[BaseException]) -> bool:
        """Whether the next picture is right after a call of the transformer raised."""
        plain, calls = type(pipe.transformer).forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == number and rank in (None, mesh.rank):
                raise error("left")
            return plain(*args, **kwargs)

        forward.__globals__["__name__"], name = plain.__globals__["__name__"], __name__
        type(pipe.transformer).forward = forward
        try:
            draw(pipe, arguments)
        except (error, ShardingError) as raised:
            told.append((type(raised).__name__, getattr(raised, "follows", False)))
        finally:
            type(pipe.transformer).forward = plain
            forward.__globals__["__name__"] = name
        return torch.equal(draw(pipe, arguments), expected)

    right = left_at(1, 1, ValueError)  # the first call of its shapes, which both make
    right &= left_at(2, None, ValueError)
    right &= left_at(2, None, KeyboardInterrupt)
    if mesh.rank == 1:  # as where it ended before the others learned something
        branches._known.clear()
        branches._calls_per_step = 1
    right &= torch.equal(draw(pipe, arguments), expected)
    handle.reset_counts()
    right &= torch.equal(draw(pipe, arguments), expected)
    told.append((branches.counts.units, branches.counts.rounds))
    handle.remove()
    return right, told


def test_calls_that_are_left_leave_nothing_behind(ranks: RankPool) -> None:
    for rank, (right, told) in enumerate(ranks.run(left_in_the_middle, cfg=2, vae_parallel=False)):
        assert right
        assert told == [
            ("ValueError", False) if rank == 1 else ("ShardingError", True),
            ("ValueError", False),
            ("KeyboardInterrupt", False),
            (6, 3),
        ]


def failing(mesh: ParallelMesh, kind: str) -> tuple[str, bool]:
    """One group's call raises, or gives other shapes than before; then all draw the next picture."""
    pipe, arguments = qwen()
    expected = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    draw(pipe, arguments)
    block, calls = pipe.transformer.norm_out, []
    plain = type(block).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if mesh.rank == 1 and len(calls) == 2:
            if kind == "raises":
                raise ValueError("there is no such branch")
            return plain(*args, **kwargs)[:, :-1]
        return plain(*args, **kwargs)

    forward.__globals__["__name__"], name = plain.__globals__["__name__"], __name__
    type(block).forward = forward
    text = ""
    try:
        draw(pipe, arguments)
    except (ValueError, ShardingError) as error:
        text = f"{type(error).__name__}: {error}"
    finally:
        type(block).forward = plain
        forward.__globals__["__name__"] = name
    again = torch.equal(draw(pipe, arguments), expected)
    handle.remove()
    return text, again


@pytest.mark.parametrize("kind", ["raises", "other shapes"])
def test_an_error_of_one_group_is_one_of_all(ranks: RankPool, kind: str) -> None:
    answers = ranks.run(failing, kind, cfg=2, vae_parallel=False)
    words = "raised an error in" if kind == "raises" else "got results of other shapes from"
    shared = f"ShardingError: ranks [1] {words} a transformer call that they compute for all"
    assert [text for text, _ in answers] == [
        shared,
        "ValueError: there is no such branch" if kind == "raises" else shared,
    ]
    assert all(again for _, again in answers)


def differing(mesh: ParallelMesh) -> str:
    pipe, arguments = qwen()
    handle = parallelize(pipe, mesh)
    if mesh.rank == mesh.world_size - 1:
        arguments["prompt_embeds"] = arguments["prompt_embeds"] * 2
    try:
        with pytest.raises(ShardingError) as error:
            draw(pipe, arguments)
    finally:
        handle.remove()
    return str(error.value)


def changed_on_one_rank(mesh: ParallelMesh) -> tuple[str, list[bool], list[int]]:
    """After a picture one rank alone gets a hook, and then other processors of the same class."""
    pipe, arguments = qwen(3)
    expected = draw(pipe, arguments)
    handle = parallelize(pipe, mesh)
    equal = [torch.equal(draw(pipe, arguments), expected)]
    is_one = mesh.rank == 1
    hook = pipe.transformer.norm_out.register_forward_hook(lambda *_: None) if is_one else None
    with pytest.raises(ShardingError) as error:
        draw(pipe, arguments)
    if hook is not None:
        hook.remove()
    handle.drop()
    with torch.autocast("cpu", enabled=is_one), pytest.raises(ShardingError, match="rank 1: autocast is enabled"):
        draw(pipe, arguments)
    handle.drop()
    equal.append(torch.equal(draw(pipe, arguments), expected))
    if is_one:
        for block in pipe.transformer.transformer_blocks:
            block.attn.set_processor(type(block.attn.processor)())
    equal.append(torch.equal(draw(pipe, arguments), expected))
    assert handle.branches is not None
    handle.reset_counts()
    equal.append(torch.equal(draw(pipe, arguments), expected))
    counts = [handle.branches.counts.units, handle.branches.counts.rounds]
    handle.remove()
    return str(error.value), equal, counts


def test_what_one_rank_alone_changes(ranks: RankPool) -> None:
    for text, equal, counts in ranks.run(changed_on_one_rank, cfg=2, vae_parallel=False):
        assert "rank 0: nothing, rank 1: code of others runs around a AdaLayerNormContinuous" in text
        assert equal == [True] * 4
        assert counts == [6, 3]


@pytest.mark.parametrize("ulysses", [1, 2])
def test_a_rank_that_draws_something_else_is_found_by_all(ranks: RankPool, ulysses: int) -> None:
    for text in ranks.run(differing, cfg=2, ulysses=ulysses):
        assert "the ranks call QwenImageTransformer2DModel with different numbers" in text
        assert f"encoder_hidden_states on ranks [{2 * ulysses - 1}]" in text


def refused(mesh: ParallelMesh) -> list[str]:
    pipe, _ = qwen()
    texts = []
    for target, captures in ((pipe.transformer, False), (pipe, True), (object(), False)):
        with pytest.raises((ConfigError, UnsupportedModelError)) as error:
            parallelize(target, mesh, cuda_graphs=captures)
        texts.append(str(error.value))
    return texts


def test_what_has_no_branches_is_refused(ranks: RankPool) -> None:
    for texts in ranks.run(refused, cfg=2):
        assert "give parallelize() the pipeline" in texts[0]
        assert "skips calls on some" in texts[1]
        assert "has no transformer" in texts[2]


def test_the_page_is_current() -> None:
    """`python -m tests.pipelines.zoo.branches --write` writes it, and what it is made of."""
    assert PAGE.read_text() == page()
    assert {name for name, entry in ENTRIES.items() if entry.runs_here} <= COUNTS.keys()


def test_the_equation_has_all_degrees() -> None:
    config = DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=3)
    assert config.world_size == 6
    assert config.equation == "cfg_parallel_size 2 × ulysses_degree 3 × ring_degree 1 = 6 ranks"


def layout(mesh: ParallelMesh) -> Any:
    return mesh.cfg.ranks, mesh.sequence.ranks, mesh.describe()


def test_cfg_is_the_outermost_axis(ranks: RankPool) -> None:
    answers = ranks.run(layout, cfg=2, ulysses=2)
    assert [answer[:2] for answer in answers] == [
        ((0, 2), (0, 1)),
        ((1, 3), (0, 1)),
        ((0, 2), (2, 3)),
        ((1, 3), (2, 3)),
    ]
    assert answers[0][2].endswith("= 4 ranks; ring of [0 1], [2 3]")
