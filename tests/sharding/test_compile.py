"""What is recorded of a block compiles into one graph, and equals eager; also blocks that somebody compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.sharding import BlockCounts
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.sharding.models import CASES, qwen_image, qwen_inputs
from tests.sharding.test_changed import add_lora
from tests.sharding.test_replay import CHANGES, changed_after_recording
from tests.sharding.zoo.all import ENTRIES
from tests.thorough import THOROUGH, in_turns, thorough_only

COMPILED = (
    "SD3Transformer2DModel",
    "LTXVideoTransformer3DModel",
    "SanaTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
)


@contextmanager
def compiling() -> Iterator[None]:
    """Without warnings of inductor's own: old imports, complex numbers that it leaves to eager."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.compiler.reset()


def compiled(mesh: ParallelMesh, name: str, backend: str) -> tuple[float, BlockCounts]:
    """The largest error of three forwards, which record, compile and run."""
    build, make_inputs = CASES[name] if name in CASES else (ENTRIES[name].build, ENTRIES[name].inputs)
    model: Any = randomise(build())
    with compiling():
        wanted = _first(model(**make_inputs()))
        handle = parallelize(model, mesh, compile={"backend": backend})
        errors = [relative_error(_first(model(**make_inputs())), wanted) for _ in range(3)]
        handle.remove()
        assert torch.equal(_first(model(**make_inputs())), wanted)
    return max(errors), handle.blocks


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output[0], torch.Tensor) else output[0][0]
    return tensor


@pytest.mark.parametrize(
    ("name", "layout"),
    in_turns(["qwen, two prompts", "wan", *COMPILED[: None if THOROUGH else 1]], [(2, 1), (1, 2), (2, 2)]),
    ids=str,
)
def test_blocks_compile_into_one_graph(ranks: RankPool, name: str, layout: tuple[int, int]) -> None:
    """The "eager" backend runs the graph as it was traced, without generating code."""
    ulysses, ring = layout
    for error, counts in ranks.run(compiled, name, "eager", ulysses=ulysses, ring=ring, timeout=300):
        assert error <= 1e-5
        assert counts.replayed > 0
        assert counts.compiled > 0
        assert not counts.followed


@pytest.mark.parametrize("name", ["qwen, 5 heads", *(COMPILED if THOROUGH else ())])
def test_generated_code_equals_eager(ranks: RankPool, name: str) -> None:
    for error, counts in ranks.run(compiled, name, "inductor", ulysses=2, timeout=600):
        assert error <= 1e-5
        assert counts.compiled > 0


def compiled_in_place(mesh: ParallelMesh, when: str) -> tuple[float, BlockCounts, bool, float]:
    """Blocks that were compiled before or after, or a part of them; and what remove() leaves."""
    # That of the test before: inductor takes long over its kernels, and keeps them.
    build, make_inputs = CASES["qwen, 5 heads"]
    model, inputs = randomise(build()), make_inputs()
    with compiling():
        wanted = model(**inputs)[0]

        def compile_blocks() -> None:
            for block in model.transformer_blocks:
                (block.attn if when == "a part of each" else block).compile(backend="eager")

        if when != "after":
            compile_blocks()
        before = [x._compiled_call_impl for x in model.modules()]
        handle = parallelize(model, mesh)
        if when == "after":
            model(**inputs)
            compile_blocks()
            before = [x._compiled_call_impl for x in model.modules()]
        error = max(relative_error(model(**inputs)[0], wanted) for _ in range(3))
        counts = handle.blocks
        handle.remove()
        kept = [x._compiled_call_impl for x in model.modules()] == before
        return error, counts, kept, relative_error(model(**inputs)[0], wanted)


@pytest.mark.parametrize("when", ["before", "after", "a part of each"])
def test_what_somebody_compiled_is_compiled(ranks: RankPool, when: str) -> None:
    for error, counts, kept, alone in ranks.run(compiled_in_place, when, ulysses=2, timeout=300):
        assert error <= 1e-5
        assert counts.compiled == 1  # both blocks are of one kind
        assert not counts.followed
        assert kept
        assert alone <= 1e-5


def shapes(mesh: ParallelMesh, texts: Sequence[int]) -> tuple[float, int, int, list[str]]:
    """Texts of many lengths, and a LoRA on the way: error, compilations, those after the LoRA, and what is said."""
    model, alone = randomise(qwen_image()), randomise(qwen_image())
    said: list[str] = []
    with compiling():
        handle = parallelize(model, mesh, compile={"backend": "eager"})
        handle.on_compile(said.append)

        def error(text: int) -> float:
            model(**qwen_inputs(text=text))
            return relative_error(model(**qwen_inputs(text=text))[0], alone(**qwen_inputs(text=text))[0])

        errors = [error(text) for text in texts]
        before = handle.blocks.compiled
        for x in (model, alone):
            add_lora(x)
        errors.append(error(texts[0]))
        return max(errors), before, handle.blocks.compiled - before, said


def test_each_shape_is_compiled_until_there_are_too_many(ranks: RankPool) -> None:
    for error, before, after, said in ranks.run(shapes, range(3, 13), ulysses=2, timeout=300):
        assert error <= 1e-5
        assert before == 8  # of ten lengths; the others are replayed as they are
        assert after == 1
        assert len(said) == before + after
        assert said[:2] == [f"compiling QwenImageTransformerBlock: kind 1, shape {n} of it" for n in (1, 2)]


def changed_after_compiling(mesh: ParallelMesh, number: int) -> tuple[float, float, BlockCounts]:
    with compiling():
        return changed_after_recording(mesh, number, compile={"backend": "eager"})


@thorough_only
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_change_is_seen_at_the_next_call(ranks: RankPool, number: int) -> None:
    for error, effect, counts in ranks.run(changed_after_compiling, number, ulysses=2, timeout=300):
        assert counts.compiled
        assert effect > 1e-4
        assert error <= 1e-5
