"""A pipeline whose weights are one file (.safetensors, .gguf), by diffusers' from_single_file.

The file holds the transformer, perhaps the VAE and the text encoders. What it lacks, and every configuration, comes
from a pipeline in diffusers' own layout: a folder or a hub id.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_sp.errors import ConfigError, ModelNotFoundError, OmniSPError
from omni_sp.pipelines.fitting import quantization_config

SUFFIXES = (".safetensors", ".gguf")
_HUB_URL = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/main/(.+)")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+)")
_SCALE = re.compile(r".*(scale_weight|weight_scale(_2|_inv)?|scaled_fp8|(scale_input|input_scale)|\.absmax)")
"""Names of what quantised weights are multiplied with, which diffusers passes over."""
_WHOLE_NUMBERS = ("I8", "U8", "I16", "I32", "I64", "U16", "U32", "U64")
_TEXT_ENCODERS = ("text_encoders.", "conditioner.", "cond_stage_model.")
_VAE = ("vae.", "first_stage_model.")
_WAY_OUT = "give single_file_config, the folder or hub id of the pipeline that it belongs to"


def is_single_file(name: str) -> bool:
    """Whether the name is that of a file that holds weights."""
    return name.lower().endswith(SUFFIXES)


def hub_file(name: str) -> tuple[str, str] | None:
    """The repository and the path in it of a file on the hub, given as OWNER/REPOSITORY/PATH or by its URL."""
    match = _HUB_URL.fullmatch(name) or _HUB_FILE.fullmatch(name)
    return None if match is None or not is_single_file(name) else (match[1], match[2])


def local_file(location: str) -> str:
    """The file on this machine; one of the hub is fetched, or found in its cache."""
    found = None if Path(location).exists() else hub_file(location)
    if found is None:
        return location
    from huggingface_hub import hf_hub_download

    return hf_hub_download(*found)


def pipeline_of(file: str) -> str:
    """The hub id of the pipeline that a file belongs to, by the names of its weights.

    Raises:
        ModelNotFoundError: diffusers does not know them, or the pipeline's configuration cannot be read.
    """
    from diffusers import DiffusionPipeline
    from diffusers.loaders import single_file_utils

    names = _names(file)
    _require_plain(file)
    known = None
    with contextlib.suppress(LookupError):  # weights that look like those of a model, and are not
        checkpoint = single_file_utils.load_single_file_checkpoint(file)
        kind = single_file_utils.infer_diffusers_model_type(checkpoint)
        # Where diffusers knows nothing, it takes the file for Stable Diffusion 1.
        if kind != "v1" or any(name.startswith("model.diffusion_model.input_blocks.") for name in names):
            known = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    if known is None:
        raise ModelNotFoundError(f"{file} does not say which pipeline it belongs to: {_WAY_OUT}")
    try:
        DiffusionPipeline.load_config(known)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ModelNotFoundError(
            f"{file} belongs to {known}, whose configuration cannot be read ({reason}): {_WAY_OUT}"
        ) from error
    return str(known)


def read_pipeline(
    file: str,
    location: str,
    pipeline_class: Any,
    classes: Mapping[str, Any],
    dtype: Any,
    quantization: str | None = None,
) -> Any:
    """Read a pipeline: from the file what it holds, the rest from the pipeline at ``location``.

    Raises:
        ConfigError: the file holds text encoders too, or quantised weights, and is to be quantised.
        ModelNotFoundError: the file is damaged, or holds something else than that pipeline's weights.
    """
    from diffusers import DiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    names = _names(file)
    _require_plain(file)
    is_whole = any(name.startswith(_TEXT_ENCODERS) for name in names)
    if quantization is not None and (is_whole or not names):
        what = "holds a whole pipeline" if is_whole else "is quantised already"
        raise ConfigError(f"quantization={quantization!r}, and {file} {what}: leave it out")
    try:
        if is_whole:
            if not hasattr(pipeline_class, "from_single_file"):
                name = pipeline_class.__name__
                raise ModelNotFoundError(f"{file} holds text encoders, and diffusers reads no whole {name} from a file")
            return pipeline_class.from_single_file(file, config=location, torch_dtype=dtype)
        components = _components(file, names, location, classes, dtype, quantization)
        return DiffusionPipeline.from_pretrained(location, dtype=dtype, **components)
    except OmniSPError:
        raise
    except NotImplementedError as error:  # torch's, of a weight without data
        raise ModelNotFoundError(f"{file} lacks weights that {location} needs: {_WAY_OUT}") from error
    except (SingleFileComponentError, LookupError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelNotFoundError(
            f"{file} does not fit {location} ({type(error).__name__}: {reason}): {_WAY_OUT}"
        ) from error


def _components(
    file: str, names: list[str], location: str, classes: Mapping[str, Any], dtype: Any, quantization: str | None
) -> dict[str, Any]:
    """The transformer, and the VAE where the file holds it."""
    if "transformer_2" in classes:
        raise ModelNotFoundError(
            f"{location} has two transformers, and nothing says which of them {file} holds: save the whole pipeline to "
            "a folder, and give that as the model"
        )
    options: dict[str, Any] = {}
    if file.endswith(".gguf"):
        from diffusers import GGUFQuantizationConfig

        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    denoiser = "unet" if "unet" in classes else "transformer"
    wanted = [denoiser, *(["vae"] if any(name.startswith(_VAE) for name in names) else [])]
    for name in wanted:
        if not hasattr(classes.get(name), "from_single_file"):
            raise ModelNotFoundError(f"diffusers reads no {name} of {location} from a single file")
    return {
        name: classes[name].from_single_file(
            file, config=location, subfolder=name, torch_dtype=dtype, **(options if name == denoiser else {})
        )
        for name in wanted
    }


def _names(file: str) -> list[str]:
    """The names of the weights in a .safetensors file; a .gguf file holds a transformer, whatever their names."""
    if not file.endswith(SUFFIXES):
        raise ModelNotFoundError(f"{file}: diffusers knows such a file by a suffix in small letters: rename it")
    if file.endswith(".gguf"):
        _require_gguf(file)
        return []
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{file} cannot be read as safetensors: {error}") from error


def _require_plain(file: str) -> None:
    """Refuse weights that are quantised in a way that diffusers does not know: it would read them as other numbers.

    Raises:
        ModelNotFoundError: they are whole numbers, or there are scales beside them.
    """
    if file.endswith(".gguf"):
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (it is no dict)
            is_scale = _SCALE.fullmatch(name)
            if is_scale or (name.endswith(".weight") and opened.get_slice(name).get_dtype() in _WHOLE_NUMBERS):
                raise ModelNotFoundError(
                    f"{file} holds quantised weights ({name}), which diffusers would take for plain ones: take a file "
                    "that is not quantised, with quantization='fp8' or 'int8' where memory is short, or a .gguf file"
                )


def _require_gguf(file: str) -> None:
    from diffusers.utils import is_gguf_available

    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelNotFoundError(f"{file} cannot be read as GGUF: it does not begin as such files do")
    if not is_gguf_available():
        raise ModelNotFoundError(f"{file} needs a package: pip install gguf")
