"""What makes a large pipeline fit beside sharding, by diffusers' own means: quantised weights, and parts on the CPU.

Only what a rank does to its own weights is here. It computes what one process with the same options computes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig
from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.validation import shown

if TYPE_CHECKING:
    import torch

_QUANTIZATIONS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
"""Name -> the class of torchao's."""
_OFFLOADS = ("model", "group")


def check_quantization(quantization: Any) -> str | None:
    """Refuse what weights cannot be quantised to, before anything is loaded for it.

    Raises:
        ConfigError: there is no such quantization, or torchao is not installed.
    """
    if quantization is None:
        return None
    if quantization not in _QUANTIZATIONS:
        raise ConfigError(
            f"quantization={shown(quantization)}: give {' or '.join(map(repr, _QUANTIZATIONS))}, which keep weights in "
            "8 bits; activations are never quantised, since that amplifies what ranks round otherwise. Weights that "
            "were quantised when they were saved (bitsandbytes, torchao, GGUF) need no option"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"quantization={quantization!r} needs torchao: pip install '.[quantization]'")
    return str(quantization)


def check_offload(offload: Any, config: DiffusionParallelConfig, *, compile: Any, cuda_graphs: bool) -> str | None:
    """Refuse offloading that there is not, or that does not go with other options.

    Args:
        offload: the user's value.
        config: the user's degrees.
        compile: the user's value.
        cuda_graphs: the user's value.

    Raises:
        ConfigError: it names the other option.
    """
    if offload is None:
        return None
    if offload not in _OFFLOADS:
        raise ConfigError(f"offload={shown(offload)}: give {' or '.join(map(repr, _OFFLOADS))}, or None")
    others = {
        "shard_weights=True": (config.shard_weights, "shards the weights that it moves"),
        "cuda_graphs=True": (cuda_graphs, "reads weights where they lay when a graph was captured"),
        f"compile={compile!r}": (
            bool(compile) and offload == "group",
            "compiles blocks without the hooks in them that move weights",
        ),
    }
    for option, (is_on, reason) in others.items():
        if is_on:
            raise ConfigError(f"offload={offload!r} and {option}, which {reason}: leave out one of them")
    return str(offload)


def quantization_config(quantization: str) -> Any:
    """Diffusers' configuration of a quantization, for ``from_pretrained`` of a transformer."""
    import torchao.quantization
    from diffusers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, _QUANTIZATIONS[quantization])())


def quantised_weight(quantization: str, weight: torch.Tensor) -> torch.nn.Parameter:
    """A linear layer's weight in 8 bits, as ``from_pretrained`` with quantization_config() makes it."""
    import torch
    import torchao.quantization

    layer = torch.nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    torchao.quantization.quantize_(layer, quantization_config(quantization).get_apply_tensor_subclass())
    return layer.weight


def mark_quantised(model: Any, quantization: str) -> None:
    """Let diffusers know of a model's quantised weights, as after ``from_pretrained``."""
    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(quantization_config(quantization), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=[])
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def quantized_transformers(quantization: str, classes: Mapping[str, Any], location: str) -> Any:
    """Diffusers' configuration for ``from_pretrained`` of a pipeline, which quantises its transformers.

    Args:
        quantization: a name that check_quantization() takes.
        classes: those of the pipeline's components, by name.
        location: the pipeline's folder or hub id.

    Raises:
        ConfigError: there is no transformer, or one that was quantised when it was saved.
    """
    from diffusers import PipelineQuantizationConfig

    names = [name for name, kind in classes.items() if name.startswith("transformer") and kind is not None]
    if not names:
        raise ConfigError(f"quantization={quantization!r} is for transformers, and {location} has none: leave it out")
    for name in names:
        saved = classes[name].load_config(location, subfolder=name).get("quantization_config")
        if saved is not None:
            raise ConfigError(
                f"quantization={quantization!r}: {name} of {location} was quantised when it was saved "
                f"({saved.get('quant_method', 'unknown')}), and is taken as it is: leave out quantization"
            )
    return PipelineQuantizationConfig(quant_mapping={name: quantization_config(quantization) for name in names})


def place(pipe: Any, device: str, offload: str | None) -> Any:
    """Move a pipeline to its device, or let diffusers do so part by part.

    On a CPU, offloading moves nothing.

    Args:
        pipe: the pipeline, on the CPU.
        device: such as "cuda:1".
        offload: "model" or "group"; None for all of it, for good.

    Raises:
        UnsupportedModelError: diffusers cannot offload this pipeline so.
    """
    import torch

    if offload is None:
        return pipe.to(device)
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_group_offload(
                onload_device=torch.device(device), offload_device=torch.device("cpu"), offload_type="leaf_level"
            )
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"offload={offload!r} of {type(pipe).__name__}: {reason}") from error
    return pipe


def cast_inputs(vae: Any) -> None:
    """Let a VAE take latents and pictures of any dtype, where it has another one than the rest of its pipeline."""
    for name in ("encode", "decode"):
        method = getattr(vae, name, None)
        if callable(method):
            setattr(vae, name, _with_cast_inputs(vae, method))


def _with_cast_inputs(vae: Any, method: Any) -> Any:
    import torch

    def cast(value: Any) -> Any:
        return value.to(vae.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call


def dtype_of_components(dtype: torch.dtype, vae_dtype: torch.dtype | None) -> Any:
    """The dtype of a pipeline's components as ``from_pretrained`` takes it."""
    return dtype if vae_dtype is None else {"default": dtype, "vae": vae_dtype}
