"""Products with some rows or columns of a linear layer's matrix, as it lies in memory, quantised to fp8 or not.

Steps by tensor parallelism use views of the matrices that steps by Ulysses use whole, with the views' own scales. What
a kernel makes of a quantised matrix is its own matter, so parts are compared with the whole once, before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_sp.errors import UnsupportedModelError
from omni_sp.llm.vllm import internals

_TOLERANCE = 0.01  # relative; a matrix that is packed, or scaled by blocks that a part cuts, is wrong by about 1
_ROWS = 5  # of the input of a comparison


def with_outputs(linear: Any, own: slice, hidden: Any) -> Tensor:
    """The product with the rows of a matrix that make some of its outputs; all inputs are there.

    Args:
        linear: vLLM's layer.
        own: which outputs.
        hidden: (tokens, inputs), as vLLM hands it to the layer.
    """
    bias = None if linear.bias is None else linear.bias[own]
    if internals.is_unquantised(linear):
        return F.linear(hidden, linear.weight[own], bias)
    product: Tensor = linear.quant_method.apply(_Part(linear, outputs=own), hidden, bias)
    return product


def with_inputs(linear: Any, own: slice, hidden: Any, bias: Tensor | None) -> Tensor:
    """The product with the columns of a matrix that take some of its inputs: a summand of all outputs.

    Args:
        linear: vLLM's layer.
        own: which inputs.
        hidden: (tokens, own inputs), as vLLM hands it to the layer.
        bias: what one of the ranks adds.
    """
    if internals.is_unquantised(linear):
        return F.linear(hidden, linear.weight[:, own], bias)
    product: Tensor = linear.quant_method.apply(_Part(linear, inputs=own), hidden, bias)
    return product


def require_parts(linear: Any, *, outputs: Sequence[slice] = (), inputs: Sequence[slice] = ()) -> None:
    """Raise UnsupportedModelError unless products with these parts are parts of the product with the whole matrix."""
    if internals.is_unquantised(linear):
        internals.require_unpacked(linear)
        return
    generator = torch.Generator().manual_seed(0)
    count = linear.input_size_per_partition
    hidden = torch.randn(_ROWS, count, generator=generator).to(linear.weight.device, linear.params_dtype)
    try:
        errors = [_difference(_whole(linear, hidden)[:, own], _bare(linear, hidden, outputs=own)) for own in outputs]
        for own in inputs:
            # Zeros elsewhere leave the activations' scales what they are for this part alone.
            masked = torch.zeros_like(hidden)
            masked[:, own] = hidden[:, own]
            errors.append(_difference(_whole(linear, masked), _bare(linear, hidden[:, own].contiguous(), inputs=own)))
    except UnsupportedModelError:
        raise
    except Exception as error:  # kernels check their arguments in many ways
        raise _no_parts(linear, f"its kernel raises {type(error).__name__}: {error}") from error
    if not max(errors) <= _TOLERANCE:
        raise _no_parts(linear, f"they differ from the whole by {max(errors):.1%}")


class _Part:
    """Stands in for a layer in what its quantisation method computes: some rows or columns, and their scales."""

    def __init__(self, whole: Any, *, outputs: slice | None = None, inputs: slice | None = None) -> None:
        self._whole = whole
        sizes = whole.output_size_per_partition, whole.input_size_per_partition
        own = (slice(None) if outputs is None else outputs), (slice(None) if inputs is None else inputs)
        matrix = whole.weight
        # Kernels take (inputs, outputs); what lies in memory is rows of outputs all the same.
        is_turned = matrix.ndim == 2 and matrix.stride(0) == 1 and matrix.stride(1) != 1
        rows = matrix.t() if is_turned else matrix
        if tuple(rows.shape) != sizes:
            raise _no_parts(whole, f"of {sizes} numbers, it lies in memory as {tuple(matrix.shape)}")
        self.weight = rows[own].t() if is_turned else rows[own]
        for name in ("weight_scale", "weight_scale_inv"):
            scale = getattr(whole, name, None)
            if scale is not None:
                setattr(self, name, _scale_of(whole, scale, sizes, own))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _scale_of(whole: Any, scale: Tensor, sizes: tuple[int, int], own: tuple[slice, slice]) -> Tensor:
    """The scales of a part: one for the matrix, one for each output, or one for each block."""
    if scale.numel() == 1:
        return scale
    if scale.numel() == sizes[0] and sizes[0] in scale.shape:
        return scale[tuple(own[0] if size == sizes[0] else slice(None) for size in scale.shape)]
    block = getattr(whole, "weight_block_size", None)
    if block is not None and tuple(scale.shape) == tuple(
        -(-size // step) for size, step in zip(sizes, block, strict=True)
    ):
        return scale[tuple(_blocks(whole, *entry) for entry in zip(own, sizes, block, strict=True))]
    raise _no_parts(whole, f"its scales are {tuple(scale.shape)}, for {sizes} numbers")


def _blocks(whole: Any, own: slice, size: int, step: int) -> slice:
    """The blocks of a range of outputs or inputs."""
    first, last, _ = own.indices(size)
    if first % step or (last % step and last != size):
        raise _no_parts(whole, f"its scales are those of blocks of {step}, which a part from {first} to {last} cuts")
    return slice(first // step, -(-last // step))


def _whole(linear: Any, hidden: Tensor) -> Tensor:
    product: Tensor = linear.quant_method.apply(linear, hidden, None)
    return product


def _bare(linear: Any, hidden: Tensor, **own: slice) -> Tensor:
    product: Tensor = linear.quant_method.apply(_Part(linear, **own), hidden, None)
    return product


def _difference(wanted: Tensor, found: Tensor) -> float:
    """The relative difference of two products; infinite where their shapes differ."""
    if wanted.shape != found.shape:
        return float("inf")
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _no_parts(linear: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{linear.prefix}, quantised by {type(linear.quant_method).__name__}, has no parts for steps by tensor "
        f"parallelism: {why}. Leave shift parallelism, or choose --quantization fp8_per_channel"
    )
