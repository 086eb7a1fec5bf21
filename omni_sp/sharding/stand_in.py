"""What is in a weight's place while each rank keeps only a part of it."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from omni_sp.sharding.torch_functions import torchs_own


class Owner(Protocol):
    """Has the parts of some weights."""

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are whole now."""

    @property
    def part(self) -> torch.Tensor:
        """This rank's part of their bytes."""

    def read(self) -> None:
        """Have them whole, for somebody who may read and write them."""


class ShardedWeight(torch.Tensor):
    """Stands in for a weight of which each rank has a part; what it says of itself is the weight's.

    Attributes:
        weight: has its numbers while its block's weights are loaded.
        owner: the weights of its block.
    """

    weight: torch.Tensor
    owner: Owner

    @staticmethod
    def __new__(cls, real: torch.Tensor, owner: Owner) -> ShardedWeight:
        """Make a tensor without numbers."""
        made: ShardedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            dtype=real.dtype,
            device=real.device,
            requires_grad=real.requires_grad,
        )
        made.weight, made.owner = real, owner
        if isinstance(real, torch.nn.Parameter):
            made._is_param = True  # by which torch knows parameters
        return made

    def __init__(self, real: torch.Tensor, owner: Owner) -> None:
        """Do nothing: `__new__` has made it."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Whoever asks by ``isinstance`` how a weight is quantised is answered by the weight."""
        return type(vars(self).get("weight", torch.Tensor()))

    def __getattr__(self, name: str) -> Any:
        """Of a quantised weight there is more to ask."""
        if name.startswith("__") or "weight" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["weight"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the weight."""
        return copy.deepcopy(_loaded(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Save the weight."""
        return _loaded(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = torchs_own(func), kwargs or {}
        if func in _CHOICES:  # the weight may require gradients or not without being read
            with torch._C.DisableTorchFunctionSubclass():
                func(args[0].weight, *args[1:], **kwargs)
                return func(*args, **kwargs)
        if func in _DESCRIPTIONS or (func in _MOVES and _is_there(*args, **kwargs)):
            with torch._C.DisableTorchFunctionSubclass():
                return args[0] if func in _MOVES else func(*args, **kwargs)
        if func == _SET_DATA and args[1] is args[0]:
            return None  # as a module does that is moved where it is
        args, kwargs = tree_map(_loaded, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_loaded, (args, kwargs or {}))
        return func(*args, **kwargs)


def _loaded(x: Any) -> Any:
    if type(x) is not ShardedWeight:
        return x
    x.owner.read()
    return x.weight


def _is_there(weight: ShardedWeight, *args: Any, **kwargs: Any) -> bool:
    """Whether ``weight.to(...)`` has nothing to do."""
    if kwargs.get("copy") or any(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())):
        return False
    kwargs = {name: x for name, x in kwargs.items() if name != "copy"}
    device, dtype, *_ = torch._C._nn._parse_to(*args[:3], **kwargs)
    return device in (None, weight.device) and dtype in (None, weight.dtype)


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_MOVES = frozenset({torch.Tensor.to})
_CHOICES = frozenset({torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
_DESCRIPTIONS = frozenset(
    _getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "itemsize")
    | _getters("nbytes", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "_version")
    | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement}
    | {torch.Tensor.stride, torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex}
    | {torch.Tensor.is_inference, torch.Tensor.is_contiguous, torch._has_compatible_shallow_copy_type}
)
"""What a stand-in answers by itself."""
