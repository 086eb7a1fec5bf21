"""Transformers of which each rank reads only its part: each weight by its place in a safetensors file.

They are built without weights, and stay so until the ranks are known. Then the weights outside of blocks are read
whole, and those of blocks are left to `omni_sp.sharding.weights`, which reads this rank's bytes of one block after the
other. What touches a transformer before has it read whole: that takes memory, and is never wrong. Weights that are
quantised while they are read, are so one after the other.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omni_sp.errors import ModelNotFoundError
from omni_sp.pipelines.fitting import mark_quantised, quantised_weight, quantization_config
from omni_sp.pipelines.lazy_components import lazy_component, leave_unread
from omni_sp.sharding.diffusers_internals import kept_in_float32
from omni_sp.sharding.replay import block_lists
from omni_sp.sharding.weight_parts import StoredWeight, mark_stored

_FILE = "diffusion_pytorch_model.safetensors"
_STORED, _QUANTIZATION = "_omni_sp_stored_weights", "_omni_sp_quantization"
_MAX_HEADER = 2**27
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of dtypes."""


def transformers_to_share(
    classes: Mapping[str, Any],
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Build the transformers of a pipeline without their weights. Warns of those that each rank has to read whole.

    Args:
        classes: those of the pipeline's components, by name; None where one is not a library's own.
        location: the folder of the pipeline.
        dtype: of their weights.
        device: where these are to be.
        quantization: how their weights are quantised, see fitting: each block's are read whole, one block after the
            other, and a rank keeps its part of what they become.
    """
    from diffusers import ModelMixin

    found = {}
    for name, kind in classes.items():
        if not name.startswith("transformer") or not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
            continue
        try:
            found[name] = _to_share(kind, location, name, dtype, device, quantization)
        except ValueError as reason:
            warn_of_whole(name, str(reason))
    return found


def warn_of_whole(name: str, reason: str) -> None:
    """Warn that every rank reads a transformer whole."""
    warnings.warn(
        f"shard_weights=True: each rank reads all weights of {name} before it keeps its part, since {reason}",
        stacklevel=4,
    )


def read_share(model: torch.nn.Module) -> None:
    """Give a transformer its weights, but for those of its blocks, of which is noted where they are.

    Nothing may run it before `omni_sp.sharding.weights` has read this rank's part of them. Any other model, and one
    whose weights something needed in the meantime, stays as it is.

    Raises:
        ModelNotFoundError: a file cannot be read.
    """
    weights: Mapping[str, StoredWeight] = vars(model).pop(_STORED, {})
    quantization = vars(model).pop(_QUANTIZATION, None)
    device = torch.device("cpu") if not weights else next(iter(weights.values())).device
    if not leave_unread(model):
        return
    in_blocks = {id(part) for block in block_lists(model) for part in block.modules()}
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                stored = weights.get(f"{path}.{name}" if path else name)
                if tensor is None:
                    continue
                if stored is None:  # it is not saved, but computed
                    held[name] = tensor.to(device)
                elif held is module._parameters and id(module) in in_blocks and tensor.numel():
                    mark_stored(tensor, stored)
                else:
                    held[name] = _whole(stored, tensor)
    if quantization is not None:
        mark_quantised(model, quantization)


def _to_share(
    kind: Any, location: str, name: str, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> Any:
    """A transformer that knows where its weights are.

    Raises:
        ValueError: they are not there as the model has them; the message says how.
    """
    folder = Path(location, name)
    if kind.load_config(location, subfolder=name).get("quantization_config") is not None:
        raise ValueError("they are quantised")
    entries = _entries(folder)
    options = {} if quantization is None else {"quantization_config": quantization_config(quantization)}
    model = lazy_component(kind, location, name, dtype=dtype, device=device, **options)
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if len({id(tensor) for _, tensor in held}) < len(held):
        raise ValueError("some of them are one tensor under two names")
    names = torch.nn.Module.state_dict(model).keys()  # its own method would read the weights
    saved = {path: tensor for path, tensor in held if path in names}
    if saved.keys() != entries.keys():
        differing = sorted(saved.keys() ^ entries.keys())
        raise ValueError(f"its files have other names than the model has, such as {differing[0]}")
    linear = {f"{path}.weight" for path, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    in_float32 = kept_in_float32(kind)  # which are not quantised either
    weights = {}
    for path, tensor in saved.items():
        file, offset, stored, shape = entries[path]
        if shape != tensor.shape:
            raise ValueError(f"{path} is {(*shape,)} in its files, and {(*tensor.shape,)} in the model")
        target = tensor.dtype if stored.is_floating_point else stored
        quantise = None
        if quantization is not None and path in linear and not any(f"{one}." in path for one in in_float32):
            quantise = functools.partial(quantised_weight, quantization)
        weights[path] = StoredWeight(file, offset, stored, target, device, quantise)
    vars(model).update({_STORED: weights, _QUANTIZATION: quantization})
    return model


def _entries(folder: Path) -> dict[str, tuple[str, int, torch.dtype, torch.Size]]:
    """Name of a weight -> the file that it is in, where its bytes begin there, its dtype and its shape."""
    index = folder / f"{_FILE}.index.json"
    if index.is_file():
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    elif (folder / _FILE).is_file():
        files = [_FILE]
    else:
        raise ValueError(f"there is no {_FILE}")
    entries = {}
    for file in (folder / name for name in files):
        header, first = _header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                if entry["dtype"] not in _DTYPES:
                    raise ValueError(f"{name} has the dtype {entry['dtype']}")
                begin = first + entry["data_offsets"][0]
                entries[name] = str(file), begin, _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its weights, and where their bytes begin.

    Raises:
        ValueError: it is damaged.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content = opened.read(min(length, _MAX_HEADER))
    try:
        header = json.loads(content)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as safetensors") from error
    if max(ends, default=0) + 8 + length != os.path.getsize(file):
        raise ValueError(f"{file} is incomplete")
    return header, 8 + length


def _whole(stored: StoredWeight, tensor: torch.Tensor) -> Any:
    try:
        return stored.whole(tensor)
    except OSError as error:
        raise ModelNotFoundError(f"a weight cannot be read: {error}") from error
