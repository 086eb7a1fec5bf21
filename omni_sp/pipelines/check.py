"""A pipeline over many ranks against the same pipeline on one: how far apart they are, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from omni_sp.pipelines.parallelize import transformers_of
from omni_sp.pipelines.run import run_call

Record = dict[str, list[torch.Tensor]]
TEXT, PICTURE = "text", "result"


def stage_errors(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int | tuple[int, ...] | None,
    device: torch.device,
    on_one_rank: Callable[[], None],
    on_all_ranks: Callable[[], None],
) -> dict[str, float]:
    """Run one call on this rank alone, and again over all ranks.

    Args:
        alone: takes the pipeline apart from the other ranks. spread: puts it back; both are called.

    Returns:
        Stage -> the largest difference, relative to the largest number of the stage in one process: "text" (prompt
        embeddings), each call of each transformer, and "result" (the finished picture, video or sound).
    """
    on_one_rank()
    try:
        reference = _recorded(pipe, arguments, seed, device)
    finally:
        on_all_ranks()
    found = _recorded(pipe, arguments, seed, device)
    return {
        stage: max(
            (difference(mine, theirs) for mine, theirs in zip(found.get(stage, []), wanted, strict=True)), default=0.0
        )
        for stage, wanted in reference.items()
    }


def _recorded(
    pipe: Any, arguments: Mapping[str, Any], seed: int | tuple[int, ...] | None, device: torch.device
) -> Record:
    record: Record = {}
    with ExitStack() as stack:
        stack.enter_context(_text_recorded(pipe, record))
        for name, model in transformers_of(pipe):
            calls = _Calls(name, record)
            stack.callback(model.register_forward_hook(calls.note).remove)
        result = run_call(pipe, arguments, seed=seed, device=device)
    record[PICTURE] = [torch.as_tensor(item) for item in (*result.images, *result.videos, *result.audios)]
    return record


class _Calls:
    """Keeps what a transformer gives, call by call."""

    def __init__(self, name: str, record: Record) -> None:
        self._name, self._record, self._number = name, record, 0

    def note(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        """A forward hook."""
        self._number += 1
        self._record[f"{self._name}, call {self._number}"] = _tensors(output)


@contextmanager
def _text_recorded(pipe: Any, record: Record) -> Iterator[None]:
    original = getattr(pipe, "encode_prompt", None)
    if original is None:
        yield
        return

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        record.setdefault(TEXT, []).extend(_tensors(result))
        return result

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt


def _tensors(value: Any) -> list[torch.Tensor]:
    """Floating-point tensors anywhere in a result, copied."""
    if isinstance(value, torch.Tensor):
        return [value.detach().float().cpu().clone()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number that is wanted; infinite for another shape, or nan."""
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    largest = wanted.abs().max().clamp(min=1e-30)
    difference = ((found - wanted).abs().max() / largest).item()
    return float("inf") if difference != difference else difference  # nan is no number to be near to
