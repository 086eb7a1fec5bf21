"""Forwards that are captured: when they are, when not, and that changes are seen.

A CUDA graph is stood in for by one that calls the captured forward again, with its own inputs and into its own outputs;
so what is shown is what surrounds a capture, on any device.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten

from omni_sp import ParallelMesh, parallelize
from omni_sp.sharding import BlockCounts
from omni_sp.sharding.replay import graphs
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise
from tests.sharding.models import qwen_image, qwen_inputs
from tests.sharding.test_changed import add_lora


def stand_in(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
    """As `graphs.capture`: what was captured is called again; as a graph, it counts nothing and compares no ranks."""
    output = function()
    owner = next(x for x in inspect.getclosurevars(function).nonlocals.values() if type(x) is graphs.ForwardGraphs)

    def launch() -> None:
        counted = graphs._Counted([*_counts(owner), owner._gathers], owner._store)
        owner.is_capturing = True
        try:
            for own, new in zip(tree_flatten(output)[0], tree_flatten(function())[0], strict=True):
                own.copy_(new)
        finally:
            owner.is_capturing = False
            counted.take_back()

    return launch, output, pool


def _counts(owner: graphs.ForwardGraphs) -> list[dict[str, int]]:
    return [count for axis in graphs._axes(owner._mesh) for count in (axis.traffic.calls, axis.traffic.bytes)]


@contextmanager
def anything_captured(capture: Any) -> Iterator[None]:
    """As if work on this device could be captured, and exchanges too."""
    with (
        torch.no_grad(),
        mock.patch.object(graphs, "can_capture", return_value=True),
        mock.patch.object(graphs, "_MOVERS", ("gloo",)),
        mock.patch.object(graphs, "capture", capture),
    ):
        yield


def refuse(_function: Callable[[], Any], _pool: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def moved(model: Any) -> None:
    """As offloading moves weights: the same parameters elsewhere."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def doubled(model: Any) -> None:
    model.img_in.weight.data.mul_(2)


def bigger_eps(model: Any) -> None:
    model.norm_out.norm.eps = 0.1


def hooked(model: Any) -> None:
    model.img_in.register_forward_hook(lambda _module, _args, output: 2 * output)


def same(model: Any) -> None:
    """Nothing changes."""


CHANGES = {same: 3, moved: 2, doubled: 3, bigger_eps: 2, add_lora: 1, hooked: 0}
"""How many of three further forwards are graphs: the first after most changes is none, and after a LoRA blocks are
recorded anew before that."""


def run(mesh: ParallelMesh, change: Callable[[Any], None], captures: Any) -> tuple[list[bool], list[BlockCounts], Any]:
    """Whether forwards equal those without graphs, before and after a change; how they ran; and their traffic."""
    outputs: list[list[torch.Tensor]] = []
    traffic = []
    counts = []
    with anything_captured(captures):
        for cuda_graphs in (False, True):
            model = randomise(qwen_image())
            handle = parallelize(model, mesh, cuda_graphs=cuda_graphs)
            for axis in (mesh.ulysses, mesh.ring, mesh.sequence):
                axis.traffic.reset()
            outputs.append([])
            for number in range(8):
                if number == 5:
                    if cuda_graphs:
                        counts.append(handle.blocks)
                    change(model)
                    handle.reset_counts()
                inputs = qwen_inputs()
                inputs["hidden_states"] = inputs["hidden_states"] * (1 + 0.1 * number)
                outputs[-1].append(model(**inputs)[0])
            counts += [handle.blocks] if cuda_graphs else []
            traffic.append([dict(axis.traffic.bytes) for axis in (mesh.ulysses, mesh.ring)])
            handle.remove()
            assert model._compiled_call_impl is None
    return [torch.equal(a, b) for a, b in zip(*outputs, strict=True)], counts, traffic


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_graph_gives_what_the_forward_gives(ranks: RankPool, change: Any) -> None:
    for equal, (before, after), (without, with_graphs) in ranks.run(run, change, stand_in, ulysses=2):
        assert all(equal)
        assert before.in_graphs == 3  # the first records, the second only replays, the third is captured
        assert after.in_graphs == CHANGES[change]
        assert with_graphs == without


def test_what_cannot_be_captured_runs_as_ever(ranks: RankPool) -> None:
    for equal, (before, _), _ in ranks.run(run, same, refuse, ulysses=2):
        assert all(equal)
        assert before.in_graphs == 0
        reasons = {"it is the first of its shape, or the model was changed": 3}
        assert before.not_in_graphs == Counter(
            {**reasons, "capturing failed: operation not permitted when stream is capturing": 2}
        )


def masked(mesh: ParallelMesh) -> Counter[str]:
    with anything_captured(refuse):
        handle = parallelize(model := randomise(qwen_image()), mesh, cuda_graphs=True)
        for _ in range(4):
            model(**qwen_inputs(lengths=(13, 7)))
        return handle.blocks.not_in_graphs


def test_a_block_that_waits_for_numbers_is_named(ranks: RankPool) -> None:
    waits = "QwenImageTransformerBlock looks at the numbers of a mask"
    for reasons in ranks.run(masked, ulysses=2):
        assert reasons == {"it is the first of its shape, or the model was changed": 1, waits: 3}


def on_a_cpu(mesh: ParallelMesh) -> Counter[str]:
    with torch.no_grad():
        handle = parallelize(model := randomise(qwen_image()), mesh, cuda_graphs=True)
        model(**qwen_inputs())
        return handle.blocks.not_in_graphs


def test_a_cpu_has_no_graphs(ranks: RankPool) -> None:
    assert ranks.run(on_a_cpu, ulysses=2) == [{"an argument lies on the cpu": 1}] * 2
