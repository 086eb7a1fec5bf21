"""Rows of a batch that are followed through a model: which are computed apart, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from omni_sp import DiffusionParallelConfig, ParallelMesh
from omni_sp.sharding.batch_rows import BatchRows, Item, prove_rows

F = nn.functional
ROWS, TOKENS, WIDTH = 3, 5, 8
WIDE = {"x": torch.randn(ROWS, TOKENS, WIDTH), "time": torch.rand(ROWS)}


class Model(nn.Module):
    """A layer, and what a test does with what comes out of it."""

    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.table, self.then = nn.Linear(WIDTH, WIDTH), nn.Embedding(7, WIDTH), then
        self.kept: Any = None
        self.all_kept: list[Any] = []
        # These attributes are restored too.
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Any, **kwargs: Any) -> Any:
        return self.then(self, self.layer(x), **kwargs)


def attend(_model: Model, x: Any, mask: Any, texts: Any, time: Any) -> Any:
    """Attention under a mask for each row, keys of two layers' texts, and an embedding that all rows share."""
    key = torch.cat([x, *texts], dim=1)
    query, key = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, key))
    out = F.scaled_dot_product_attention(query, key, key, attn_mask=mask[:, None, None])
    out = out.transpose(1, 2).flatten(2) * time[:, None, None]
    return (out + torch.arange(TOKENS)[None, :, None], {"sums": out.sum(-1).t()}, "plain")


def by_positions(model: Model, x: Any, img_ids: Any, time: Any) -> Any:
    return x + model.table(img_ids[0]) * time[:, None, None]


def by_classes(model: Model, x: Any, classes: Any) -> Any:
    return x + model.table(classes)[:, None]


def with_torchs_attention(model: Model, x: Any) -> Any:
    attention = nn.MultiheadAttention(WIDTH, 2)
    attention.load_state_dict({name: torch.full_like(p, 0.1) for name, p in attention.state_dict().items()})
    x = x.transpose(0, 1)
    return model.layer(attention(x, x, x, need_weights=False)[0]).transpose(0, 1)


def keeping(model: Model, x: Any) -> Any:
    model.kept = x
    model.all_kept.append(x)
    model.scale = x.new_ones(())
    return x


def doubled(_model: Model, x: Any) -> Any:
    """All rows twice, and back: each group does so with its own."""
    return torch.cat([x, x]).chunk(2)[0]


def drawing(_model: Model, x: Any) -> Any:
    torch.randn(3)
    return x


@pytest.mark.parametrize(
    ("then", "more", "inputs", "outputs"),
    [
        (
            attend,
            {
                "mask": torch.arange(15).expand(ROWS, 15) % 4 < 3,
                "texts": torch.randn(2, ROWS, TOKENS, WIDTH),
                "time": WIDE["time"],
            },
            (0, 0, 1, 0),
            (0, 1),
        ),
        (by_positions, {"img_ids": torch.arange(TOKENS).expand(ROWS, -1), "time": WIDE["time"]}, (0, None, 0), (0,)),
        (by_classes, {"classes": torch.tensor([1, 4, 2])}, (0, 0), (0,)),
        (with_torchs_attention, {}, (0,), (0,)),
        (doubled, {}, (0,), (0,)),
        (keeping, {}, (0,), (0,)),
        (drawing, {}, (0,), (0,)),
    ],
)
def test_rows_that_are_apart(then: Any, more: dict[str, Any], inputs: Any, outputs: Any) -> None:
    model, kwargs = Model(then).eval(), {"x": WIDE["x"], **more}
    with torch.no_grad():
        whole = tensors(model(**kwargs))
        before = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(model).items()}
        length, drawn = len(model.all_kept), torch.get_rng_state()
        rows = prove_rows(model, mesh(), (), kwargs, whole)
        assert rows == BatchRows(ROWS, inputs, outputs)
        assert vars(model) == before
        assert len(model.all_kept) == length
        assert torch.equal(torch.get_rng_state(), drawn)
        for start, stop in ((0, 1), (1, ROWS)):
            args, taken = rows.take((), kwargs, start, stop)
            assert rows.are_rows(tensors(model(*args, **taken)), whole, start, stop)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda _, x: x - x.mean(0, keepdim=True), "aten.mean.dim needs all rows of a batch"),
        (lambda _, x: x - x.sum(0, keepdim=True), "all_reduce needs all rows of a batch"),
        (lambda _, x: x + x[0], "aten.select.int takes rows out of a batch"),
        (lambda _, x: torch.cat([x[:1], x[1:] * 2]), "aten.slice.Tensor takes rows out of a batch"),
        (lambda _, x: torch.cat([x.flatten(0, 1)[TOKENS:], x[0]]), "aten.slice.Tensor takes rows out of a batch"),
        (lambda _, x: x.flip(0), "aten.flip.default needs all rows of a batch"),
        (lambda _, x: x if bool(x.sum() > 1e9) else x * 2, "aten.sum.default needs all rows of a batch"),
        (lambda _, x: (x, torch.ones(ROWS)), "a result needs all rows of a batch"),
        (lambda _, x: x.tolist(), "the rows of a batch cannot be followed: RuntimeError"),
    ],
)
def test_rows_that_are_not(then: Any, reason: str) -> None:
    model = Model(then)
    with torch.no_grad():
        assert prove_rows(model, mesh(), (WIDE["x"],), {}, tensors(model(WIDE["x"]))) == reason


def test_sizes_are_found_by_the_numbers() -> None:
    """Code that looks at the size of its batch computes rows apart, and other rows where there are fewer."""
    model = Model(lambda _, x: x * len(x))
    with torch.no_grad():
        whole = [model(WIDE["x"])]
        rows = prove_rows(model, mesh(), (WIDE["x"],), {}, whole)
        assert isinstance(rows, BatchRows)
        assert not rows.are_rows([model(WIDE["x"][:2])], whole, 0, 2)
        assert not rows.are_rows([whole[0][:2].double()], whole, 0, 2)
        assert rows.are_rows([whole[0][:2] * (1 + 1e-6)], whole, 0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_limit_is_what_the_dtype_rounds(dtype: torch.dtype) -> None:
    """Numbers that are a few roundings apart are alike; code that looks at the size of its batch is no rounding."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(2, 64, 16, generator=generator).to(dtype)
    rows, eps = BatchRows(2, (0,), (0,)), torch.finfo(dtype).eps
    rounded = (whole[:1].float() * (1 + 3 * eps * torch.randn(1, 64, 16, generator=generator).clamp(-2, 2))).to(dtype)
    assert rows.are_rows([rounded], [whole], 0, 1)
    shifted = (whole[:1].float() * 1.05).to(dtype)  # the size of the batch is a factor
    assert not rows.are_rows([shifted], [whole], 0, 1)
    one_token = whole[:1].clone()
    one_token[0, 5] *= 1.15
    assert not rows.are_rows([one_token], [whole], 0, 1)
    infinite = whole.clone()
    infinite[0, 0, 0] = torch.inf
    assert rows.are_rows([infinite[:1]], [infinite], 0, 1)
    assert not rows.are_rows([whole[:1]], [infinite], 0, 1)


def test_what_is_no_batch() -> None:
    model = Model(lambda _, x: x)
    one = WIDE["x"][:1]
    assert prove_rows(model, mesh(), (one,), {"time": WIDE["time"]}, [one]) is None
    assert prove_rows(model, mesh(), (), {}, []) is None
    assert prove_rows(model, mesh(), ([[one[0]], [one[0]]],), {}, []) == "a batch comes as lists in a list"


class ListModel(nn.Module):
    """Pads rows of different lengths to one batch, and takes them out of it again."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.layer, self.mixes = nn.Linear(WIDTH, WIDTH), mixes

    def forward(self, x: list[Any], time: Any, texts: list[Any]) -> list[Any]:
        lengths = [len(text) for text in texts]
        rows = self.layer(torch.cat([torch.cat([row, row[-1:].repeat(2, 1)]) for row in x]))
        pictures = rows.split([len(row) + 2 for row in x])
        pairs = [torch.cat([picture, self.layer(text)]) for picture, text in zip(pictures, texts, strict=True)]
        joined = nn.utils.rnn.pad_sequence(pairs, True)
        mask = torch.zeros(joined.shape[:2], dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, : TOKENS + 2 + length] = True
        heads = joined.unflatten(-1, (2, 4)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask[:, None, None])
        out = out.transpose(1, 2).flatten(2) * time[:, None, None]
        taken = [row[:TOKENS] for row in out.unbind(0)]
        return [row + taken[0] for row in taken] if self.mixes else taken


def test_rows_of_a_list() -> None:
    given = [[*WIDE["x"]], WIDE["time"], [torch.randn(length, WIDTH) for length in (3, 7, 4)]]
    with torch.no_grad():
        model = ListModel(mixes=False)
        whole = model(*given)
        rows = prove_rows(model, mesh(), (*given,), {}, whole)
        items = tuple(map(Item, range(ROWS)))
        assert rows == BatchRows(ROWS, (*items, 0, *items), items)
        args, _ = rows.take((*given,), {}, 1, ROWS)
        assert [len(one) for one in args] == [2, 2, 2]
        assert rows.are_rows(model(*args), whole, 1, ROWS)
        mixing = prove_rows(ListModel(mixes=True), mesh(), (*given,), {}, whole)
    assert isinstance(mixing, str)
    assert mixing.endswith("all rows of a batch")


def tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_flatten(output)[0] if isinstance(x, torch.Tensor)]


def mesh() -> ParallelMesh:
    return ParallelMesh(DiffusionParallelConfig())
