"""Parts of quantised matrices: views with their own scales, or refused by name. No vLLM is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.vllm.matrix_parts import require_parts, with_inputs, with_outputs

OUTPUTS, INPUTS = 12, 8
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _a_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__dict__["__version__"] = "0.99.0"
    monkeypatch.setitem(sys.modules, "vllm", module)


class Method:
    """A quantised product: of a matrix as (inputs, outputs) or (outputs, inputs), and scales of any form."""

    def __init__(self, decode: Callable[[Any], Tensor]) -> None:
        self._decode = decode

    def apply(self, layer: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        product = hidden @ self._decode(layer)
        return product if bias is None else product + bias


def linear(weight: Tensor, decode: Callable[[Any], Tensor], **scales: Any) -> Any:
    """A layer of vLLM, as far as parts use it."""
    return SimpleNamespace(
        weight=weight, bias=torch.arange(float(OUTPUTS)), quant_method=Method(decode), params_dtype=torch.float32,
        output_size_per_partition=OUTPUTS, input_size_per_partition=INPUTS, prefix="layers.0.o_proj", **scales,
    )  # fmt: skip


def rows() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)).to(FP8)


def by_channel() -> Any:
    scale = torch.linspace(1, 2, OUTPUTS)[:, None]
    return linear(rows().t(), lambda layer: layer.weight.float() * layer.weight_scale.t(), weight_scale=scale)


def by_tensor() -> Any:
    return linear(rows().t(), lambda layer: layer.weight.float() * layer.weight_scale, weight_scale=torch.tensor([2.0]))


def by_block() -> Any:
    def decode(layer: Any) -> Tensor:
        spread = layer.weight_scale_inv.repeat_interleave(4, 0).repeat_interleave(4, 1)
        scaled: Tensor = layer.weight.float() * spread
        return scaled.t()

    scale = torch.linspace(1, 2, 6).view(3, 2)
    return linear(rows(), decode, weight_scale_inv=scale, weight_block_size=[4, 4])


@pytest.mark.parametrize("make", [by_channel, by_tensor, by_block])
def test_parts_are_views_whose_products_are_parts_of_the_whole(make: Callable[[], Any]) -> None:
    layer = make()
    hidden = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1))
    whole = layer.quant_method.apply(layer, hidden, None)
    outputs = [slice(0, 4), slice(8, 12)]
    require_parts(layer, outputs=outputs)
    require_parts(layer, inputs=[slice(0, 4), slice(4, 8)])
    for own in outputs:
        torch.testing.assert_close(with_outputs(layer, own, hidden), (whole + layer.bias)[:, own])
    halves = [with_inputs(layer, slice(at, at + 4), hidden[:, at : at + 4], None) for at in (0, 4)]
    torch.testing.assert_close(sum(halves), whole)
    seen: list[Any] = []
    layer.quant_method.apply = lambda part, *_: seen.append(part)
    with_outputs(layer, slice(4, 8), hidden)
    assert seen[0].weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def packed() -> Any:
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(2))
    return linear(rows()[order].t(), lambda layer: layer.weight.float()[:, order.argsort()[: layer.weight.shape[1]]])


def of_another_shape() -> Any:
    return linear(rows().reshape(2, -1), lambda layer: layer.weight.float())


def of_unknown_scales() -> Any:
    return linear(rows().t(), lambda layer: layer.weight.float(), weight_scale=torch.ones(5, 2))


def of_a_kernel_that_raises() -> Any:
    def decode(layer: Any) -> Tensor:
        if layer.weight.shape[1] != OUTPUTS:
            raise RuntimeError("strides")
        whole: Tensor = layer.weight.float()
        return whole

    return linear(rows().t(), decode)


@pytest.mark.parametrize(
    ("make", "own", "message"),
    [
        (by_block, slice(0, 6), "blocks of 4, which a part from 0 to 6 cuts"),
        (packed, slice(0, 4), "raises IndexError|they differ from the whole by"),
        (of_another_shape, slice(0, 4), r"of \(12, 8\) numbers, it lies in memory as \(2, 48\)"),
        (of_unknown_scales, slice(0, 4), r"its scales are \(5, 2\)"),
        (of_a_kernel_that_raises, slice(0, 4), "its kernel raises RuntimeError: strides"),
    ],
)
def test_a_matrix_without_parts_is_refused_by_name(make: Callable[[], Any], own: slice, message: str) -> None:
    layer = make()
    if message.startswith("of"):  # it cannot be multiplied as a whole here
        layer.quant_method.apply = lambda part, hidden, _: hidden @ torch.zeros(INPUTS, OUTPUTS)
    with pytest.raises(
        UnsupportedModelError, match=rf"layers\.0\.o_proj, quantised by Method, has no parts.*{message}"
    ):
        require_parts(layer, outputs=[own])


def test_plain_matrices_are_used_as_they_were_loaded() -> None:
    class UnquantizedLinearMethod:
        """As vLLM names it."""

    layer = linear(rows().float(), lambda _: torch.empty(0))
    layer.quant_method = UnquantizedLinearMethod()
    require_parts(layer, outputs=[slice(0, 3)])
    hidden = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1))
    whole = hidden @ layer.weight.t()
    torch.testing.assert_close(with_outputs(layer, slice(2, 5), hidden), (whole + layer.bias)[:, 2:5])
    torch.testing.assert_close(
        with_inputs(layer, slice(0, 5), hidden[:, :5], layer.bias)
        + with_inputs(layer, slice(5, 8), hidden[:, 5:], None),
        whole + layer.bias,
    )
    layer.weight = layer.weight[:3]
    with pytest.raises(UnsupportedModelError, match="turned the matrix"):
        require_parts(layer, outputs=[slice(0, 3)])
