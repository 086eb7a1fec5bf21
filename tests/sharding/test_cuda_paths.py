"""Transformers on fake CUDA tensors: followed and replayed, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_sp import parallelize
from omni_sp.sharding import BlockCounts, foreign_code
from omni_sp.sharding.replay import graphs
from tests.fake_cuda import FakeCuda, fake_mesh, on_cuda
from tests.sharding.zoo.all import ENTRIES
from tests.thorough import THOROUGH

# Torch says so where a model copies a tensor, and where following knows a mask again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # Flux3's own
]

# Classes that read no numbers, neither a mask's nor others: fake tensors have none.
NAMES = ["SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel"]
MORE = [
    "Allegro", "AnyFlow", "AuraFlow", "BriaFibo2", "Bria", "ChronoEdit", "CogVideoX", "CogView3Plus", "CogView4",
    "ConsisID", "Cosmos", "DiT", "DreamLite", "EasyAnimate", "Flux2", "Flux3", "Helios", "JoyImageEdit", "Kandinsky5",
    "LTX2Video", "Latte", "LongCatImage", "OvisImage", "PixArt", "SanaVideo", "SanaWM", "SanaWMLTX2Refiner", "Sana",
    "SkyReelsV2", "WanAnimate", "WanVACE", "MiniMaxMusic3",
]  # fmt: skip
LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 2)]
RUNS = [
    (entry_id, layout)
    for entry_id, entry in ENTRIES.items()
    for layout in LAYOUTS
    if entry_id == entry.name and entry.runs_here
    if (entry.name in NAMES and layout == (2, 2))
    or (entry.name == NAMES[0] and (THOROUGH or layout != (2, 1)))  # (4, 2) has what (2, 1) has
    or (THOROUGH and layout == (2, 2) and entry.name.partition("Transformer")[0] in MORE)
]


def build(make: Callable[[], Any]) -> torch.nn.Module:
    """A model in bfloat16, whose weights are fake."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: torch.nn.Module = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def second_forward(model: Any, inputs: dict[str, Any], fake_cuda: FakeCuda) -> tuple[Tensor, list[str]]:
    """What it gives, and what waited for the device in it."""
    model(**inputs)
    fake_cuda.waits.clear()
    out = model(**inputs)[0]
    return out, list(fake_cuda.waits)


@pytest.mark.parametrize(("name", "layout"), RUNS, ids=str)
def test_neither_following_nor_replay_waits_for_the_device(
    fake_cuda: FakeCuda, name: str, layout: tuple[int, int]
) -> None:
    with fake_mesh(*layout) as mesh, fake_cuda, torch.no_grad():
        model, inputs = build(ENTRIES[name].build), on_cuda(ENTRIES[name].inputs(), torch.bfloat16)
        expected, waits = second_forward(model, inputs, fake_cuda)
        for replay in (False, True):
            handle = parallelize(model, mesh, replay=replay)
            out, own_waits = second_forward(model, inputs, fake_cuda)
            assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
            assert own_waits == waits  # of the model's own code, which are the same on one process
            counts = handle.blocks
            handle.remove()
    assert counts.replayed
    assert not counts.followed


class Waiting(nn.Module):
    """A block that looks at a sum of its weights, on the device or on the host."""

    def __init__(self, on_host: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.on_host = on_host

    def forward(self, x: Tensor) -> Tensor:
        total = self.layer.weight.sum()
        out: Tensor = self.layer(x) + (total.cpu().to(x.device) if self.on_host else total)
        return out


class Model(nn.Module):
    def __init__(self, on_host: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Waiting(on_host)])

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_replayed_block_that_waits_is_seen(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, on_host: bool
) -> None:
    monkeypatch.setattr(foreign_code, "KNOWN_PACKAGES", {*foreign_code.KNOWN_PACKAGES, "tests"})
    with fake_mesh(2) as mesh, fake_cuda, torch.no_grad():
        model = build(lambda: Model(on_host))
        handle = parallelize(model, mesh)
        inputs = on_cuda({"x": torch.ones(1, 7, 8)}, torch.bfloat16)
        _, waits = second_forward(model, inputs, fake_cuda)
        assert handle.blocks == BlockCounts(replayed=1, recorded=1)
    assert len(waits) == 2 * on_host


def test_numbers_that_are_read_raise(fake_cuda: FakeCuda) -> None:
    """So nothing in the tests above reads any."""

    class Reads(Waiting):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * self.layer.weight.sum().item()
            return out

    with fake_mesh(2) as mesh, fake_cuda, torch.no_grad():
        model = build(lambda: Model(False))
        model.blocks = nn.ModuleList([build(lambda: Reads(False))])
        parallelize(model, mesh)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            model(on_cuda(torch.ones(1, 7, 8), torch.bfloat16))


def captured_forwards(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda, model: Any, inputs: Any) -> list[list[str]]:
    """What waited for the device in each forward that was captured; three are run, and nothing is launched."""
    waits: list[list[str]] = []

    def capture(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
        fake_cuda.waits.clear()
        output = function()
        waits.append(list(fake_cuda.waits))
        return lambda: None, output, pool

    monkeypatch.setattr(graphs, "capture", capture)
    for _ in range(4):
        model(**inputs)
    return waits


def test_a_forward_of_replays_is_captured_without_waiting(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_mesh(2, 2) as mesh, fake_cuda, torch.no_grad():
        model, inputs = build(ENTRIES[NAMES[0]].build), on_cuda(ENTRIES[NAMES[0]].inputs(), torch.bfloat16)
        handle = parallelize(model, mesh, cuda_graphs=True)
        assert captured_forwards(monkeypatch, fake_cuda, model, inputs) == [[]]
        assert handle.blocks.in_graphs == 2


def test_a_block_that_waits_is_not_captured(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_code, "KNOWN_PACKAGES", {*foreign_code.KNOWN_PACKAGES, "tests"})
    with fake_mesh(2) as mesh, fake_cuda, torch.no_grad():
        model, inputs = build(lambda: Model(True)), on_cuda({"x": torch.ones(1, 7, 8)}, torch.bfloat16)
        handle = parallelize(model, mesh, cuda_graphs=True)
        assert not captured_forwards(monkeypatch, fake_cuda, model, inputs)
        assert any("Waiting calls aten.to" in reason for reason in handle.blocks.not_in_graphs)
