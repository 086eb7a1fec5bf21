"""What a forward of a transformer costs, counted on fake tensors, which have shapes and no numbers: any size fits.

Numbers that decide what a model does, such as those of masks, are real. A few blocks are run, and scaled up to all.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from omni_sp.planner.inputs import Inputs, Size
from omni_sp.planner.published import Published
from omni_sp.sharding.tracked import TokenTensor
from omni_sp.sharding.tracked.tensor import GatheredView

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Counts what is done with fake tensors, and computes the numbers that decide.

    Whole numbers and truths that a model makes (positions, masks) are real tensors, and so is what is computed from
    real tensors alone.

    Attributes:
        flops: by the path of the innermost module; numbers in paths are "*".
        attentions: the calls of attention, by (query tokens, key tokens, heads, head_dim).
        rows: the FLOPs of linear layers, by the tokens that they see.
        elements: of the results of all that is counted, together.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.attentions: Counter[tuple[int, int, int, int]] = Counter()
        self.rows: Counter[int] = Counter()
        self.elements = 0
        self._paths = {id(module): re.sub(r"\b\d+\b", "*", path) for path, module in model.named_modules()}
        self._running: list[str] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while this lasts."""

        def begin(module: torch.nn.Module, _args: Any) -> None:
            self._running.append(self._paths.get(id(module), ""))

        def end(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            self._running.pop()

        hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, (TokenTensor, GatheredView)) for kind in types):
            return NotImplemented  # to the rules, which call plain operations
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket is aten.index:
            args = (args[0], [_as_places(x) for x in args[1]])
        result = func(*args, **kwargs)
        if not tensors and isinstance(result, FakeTensor) and not result.is_floating_point():
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        number = _flops(func.overloadpacket, args, kwargs, result)
        if number:
            self.flops[self._running[-1] if self._running else ""] += number
            output = result[0] if isinstance(result, tuple) else result
            self.elements += output.numel()
            if func.overloadpacket in (aten.mm, aten.addmm):
                self.rows[args[-2].shape[0]] += number
            if "scaled_dot_product" in str(func):
                (_, heads, query, head_dim), key = args[0].shape, args[1].shape[2]
                self.attentions[query, key, heads, head_dim] += 1
        return result


def _as_places(index: Any) -> Any:
    """A mask that picks elements as their places, whose number a fake tensor would not know."""
    if not isinstance(index, torch.Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return index
    assert index.ndim == 1
    with unset_fake_temporarily():
        return index.nonzero()[:, 0]


def _flops(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Additions and multiplications of one call, as torch counts them."""
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # which torch does not know
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


@contextmanager
def fake_forward(
    published: Published, size: Size | None = None, **changes: Any
) -> Iterator[tuple[torch.nn.Module, Inputs]]:
    """A model with fake weights, and the arguments of its forward; both are of use while this lasts.

    Args:
        published: the model.
        size: of what it draws; None for the published one.
        **changes: other values of its configuration.
    """
    import diffusers

    real = published.inputs(size or published.published_size)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = getattr(diffusers, published.transformer)(**{**published.config, **changes}).eval()
        if not getattr(model.config, "guidance_embeds", True):
            real.pop("guidance", None)
        yield model, tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape) if x.is_meta else x, real)


def of_all_blocks(published: Published, count: Callable[..., tuple[Counter[Any], ...]]) -> tuple[Counter[Any], ...]:
    """What ``count`` counts, of a model with all its blocks.

    Few blocks of each kind are run, and one more of each: beyond the first few, all of a kind do the same.

    Args:
        published: the model.
        count: takes other values of the configuration as keywords.
    """
    import diffusers

    defaults = inspect.signature(getattr(diffusers, published.transformer)).parameters
    few = dict.fromkeys(published.depth, published.few)
    base = count(**few)
    totals = tuple(Counter(one) for one in base)
    for kind in published.depth:
        number = published.config.get(kind, defaults[kind].default) - published.few
        more = count(**{**few, kind: published.few + 1})
        for total, with_one_more, without in zip(totals, more, base, strict=True):
            total.update({name: number * (value - without[name]) for name, value in with_one_more.items()})
    return totals
