"""The difference between a pipeline over many ranks and the same pipeline on one, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch

from omni_sp.pipelines.parallelize import transformers_of
from omni_sp.pipelines.run import run_call

_Record = dict[str, list[torch.Tensor]]


def stage_errors(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    seed: int | tuple[int, ...] | None,
    device: torch.device,
    on_one_rank: Callable[[], None],
    on_all_ranks: Callable[[], None],
) -> dict[str, float]:
    """Run one call of a parallelized pipeline on this rank alone, and again over all ranks.

    Args:
        on_one_rank: lets the pipeline run without the other ranks; called before the first run.
        on_all_ranks: parallelizes the pipeline again; called before the second run, also where the first one failed.

    Returns:
        Stage -> the largest difference, relative to the largest number of the stage in one process. The stages are
        "text" (prompt embeddings), each call of each transformer, and "result" (the finished image, video or sound).
    """
    on_one_rank()
    try:
        reference = _run_recorded(pipe, arguments, seed, device)
    finally:
        on_all_ranks()
    found = _run_recorded(pipe, arguments, seed, device)
    return {
        stage: max((difference(*pair) for pair in zip(found.get(stage, []), wanted, strict=True)), default=0.0)
        for stage, wanted in reference.items()
    }


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest wanted number; infinite for another shape, or for nan."""
    if found.shape != wanted.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    largest = wanted.abs().max().clamp(min=1e-30)
    relative = ((found - wanted).abs().max() / largest).item()
    return math.inf if math.isnan(relative) else relative


def _run_recorded(
    pipe: Any, arguments: Mapping[str, Any], seed: int | tuple[int, ...] | None, device: torch.device
) -> _Record:
    record: _Record = {}
    with ExitStack() as stack:
        _record_text(pipe, record, stack)
        for name, model in transformers_of(pipe):
            stack.callback(model.register_forward_hook(_output_recorder(name, record)).remove)
        result = run_call(pipe, arguments, seed=seed, device=device)
    record["result"] = [torch.as_tensor(item) for item in (*result.images, *result.videos, *result.audios)]
    return record


def _output_recorder(name: str, record: _Record) -> Callable[[torch.nn.Module, Any, Any], None]:
    """A forward hook that records what a transformer returns, call by call."""
    numbers = count(1)

    def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        record[f"{name}, call {next(numbers)}"] = _tensors(output)

    return hook


def _record_text(pipe: Any, record: _Record, stack: ExitStack) -> None:
    original: Any = getattr(pipe, "encode_prompt", None)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        record.setdefault("text", []).extend(_tensors(result))
        return result

    if original is not None:
        pipe.encode_prompt = encode_prompt
        stack.callback(delattr, pipe, "encode_prompt")


def _tensors(value: Any) -> list[torch.Tensor]:
    """Copies of the floating-point tensors anywhere in a result."""
    if isinstance(value, torch.Tensor):
        return [value.detach().float().cpu().clone()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
