"""LoRA adapters of a loaded pipeline: read once, then put on and off between calls, without a change of any weight.

An adapter is never merged into the weights of the model: it stays beside them, and a call says which adapters count,
and by how much. So a model that has switched a hundred times computes what it did at the first.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from omni_sp.collectives import gather_texts, require_equal
from omni_sp.errors import ConfigError
from omni_sp.mesh import ParallelMesh

Scales = tuple[tuple[str, float], ...]
"""The adapters of a call, by name, with what each counts."""

_DOWN = re.compile(r"lora_A|lora_down|lora\.down")
_SHOWN = 3
"""Weights that an error names, at most."""


class LoraAdapters:
    """The adapters of a pipeline. All ranks of the mesh make it, with the same names; none is on at first.

    Args:
        pipe: the pipeline, whose components get the adapters' layers.
        paths: name -> a folder, a file of weights, or a hub id.
        mesh: the ranks, which find out together whether all of them have the same adapters.

    Raises:
        ConfigError: an adapter cannot be read, touches no layer or does not fit, on some rank. All ranks raise it.
        ShardingError: the ranks have different weights under one name.
    """

    def __init__(self, pipe: Any, paths: Mapping[str, str], mesh: ParallelMesh) -> None:
        self._pipe, self._on = pipe, Scales()
        for name, path in paths.items():
            problem = _load(pipe, name, path)
            # One rank may lack the file that the others have. Each says what it found, so that all go on, or none.
            problems = dict(enumerate(gather_texts(problem, mesh.world)))
            if found := {rank: text for rank, text in problems.items() if text}:
                ranks = "" if len(found) == len(problems) else f" on ranks {list(found)}"
                raise ConfigError(f"the LoRA adapter {name!r}{ranks}: {next(iter(found.values()))}")
            require_equal(
                mesh.world,
                f"ranks {{ranks}} have other weights of the LoRA adapter {name!r} than rank 0: give all the same files",
                weights=[weight.detach().float().cpu() for _, weight in _weights(pipe, name)],
            )
        if paths:
            self._enable(is_on=False)

    def apply(self, scales: Scales) -> None:
        """Put on these adapters and no others, until the next time. Every rank does it before the same call."""
        if scales == self._on:
            return
        self._enable(is_on=bool(scales))
        if scales:
            from diffusers.utils.peft_utils import set_weights_and_activate_adapters

            names, factors = zip(*scales, strict=True)
            for _, component in _adapted(self._pipe):
                set_weights_and_activate_adapters(component, list(names), list(factors))
        self._on = scales

    def _enable(self, *, is_on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for _, component in _adapted(self._pipe):
            for module in component.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(enabled=is_on)


def _load(pipe: Any, name: str, path: str) -> str:
    """Read an adapter into the pipeline. Returns what is wrong with it, "" for nothing."""
    kind = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        return f"{kind} takes no LoRA: diffusers has no load_lora_weights for it"
    is_file = Path(path).is_file()
    where = {"weight_name": Path(path).name} if is_file else {}
    folder = str(Path(path).parent) if is_file else path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are several adapters is meant
            pipe.load_lora_weights(folder, adapter_name=name, **where)
            saved = pipe.lora_state_dict(folder, **where)
    except Exception as error:  # a file may be anything, and each kind of damage has an error of its own
        return f"{path} does not fit {kind}, or cannot be read: {' '.join(str(error).split())[:400]}"
    saved = saved[0] if isinstance(saved, tuple) else saved
    given = [key for key in saved if _DOWN.search(key)]
    taken = [key for key, _ in _weights(pipe, name) if ".lora_A." in key]
    if not taken:
        return f"{path} touches no layer of {kind}"
    if len(taken) != len(given):
        lost = [key for key in given if not any(_layer(key).endswith(_layer(one)) for one in taken)]
        shown = f", such as {', '.join(lost[:_SHOWN])}" if lost else ""
        return f"{path} does not fit {kind}: of {len(given)} layers in it, {len(taken)} are in the model{shown}"
    return ""


def _layer(key: str) -> str:
    """The path of the layer that a weight of an adapter belongs to."""
    return _DOWN.split(key)[0].rstrip(".")


def _adapted(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The components of a pipeline that adapters have layers in, by name."""
    for name, component in getattr(pipe, "components", {}).items():
        if isinstance(component, torch.nn.Module) and "peft_config" in vars(component):
            yield name, component


def _weights(pipe: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """The weights of an adapter in the pipeline, by their paths."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    return [
        (f"{part}.{path}", weight)
        for part, component in _adapted(pipe)
        for path, weight in component.named_parameters()
        if own.search(path)
    ]
