"""Find a model by its name, and load its diffusers pipeline. Only loading needs torch."""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omni_sp.errors import ConfigError, ModelNotFoundError, OmniSPError
from omni_sp.pipelines.shapes import SHAPES_CALL, SHAPES_MODEL, shapes_folder
from omni_sp.pipelines.single_file import hub_file, is_single_file, local_file, pipeline_of, read_pipeline
from omni_sp.validation import shown

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WAY_OUT = (
    "give a hub id such as Qwen/Qwen-Image, a folder that a diffusers pipeline was saved to, a .safetensors or .gguf "
    f"file, or {SHAPES_MODEL} (the embedded demo model)"
)

OnComponent = Callable[[str, int, int], None]
"""Called with the name of a component, the number of components read before it, and the number of all."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from: its name as the user gave it, and the folder, file or hub id that diffusers loads.

    Attributes:
        single_file_config: of a file, the folder or hub id of the pipeline that it belongs to; None to find it out.
        sampling_defaults: what to use where the user gives nothing, named as in OmniDiffusionSamplingParams. Empty for
            all models but the demo model, whose class has defaults for larger ones.
    """

    name: str
    location: str
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    single_file_config: str | None = None


def resolve_model(
    model: str | os.PathLike[str], single_file_config: str | os.PathLike[str] | None = None
) -> ModelSource:
    """Find a model before anything is started for it: the embedded demo model, a local folder or file, or a hub id.

    Of a hub id only ``model_index.json`` is looked up here (in the cache, else on the hub), or that there is such a
    file.

    Raises:
        ModelNotFoundError: there is no such model, or no such pipeline for a single file.
        ConfigError: single_file_config is given for a model that is no single file, or is one itself.
    """
    source = _resolved(model)
    if single_file_config is None:
        return source
    if not is_single_file(source.location):
        raise ConfigError(
            f"single_file_config is for a model that is one file, and {source.name} is none: leave it out"
        )
    try:
        pipeline = _resolved(single_file_config)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"single_file_config: {error}") from error
    if is_single_file(pipeline.location):
        raise ConfigError(
            f"single_file_config={shown(pipeline.name)} is one file: give the folder or hub id of a pipeline"
        )
    return replace(source, single_file_config=pipeline.location, sampling_defaults=pipeline.sampling_defaults)


def _resolved(model: str | os.PathLike[str]) -> ModelSource:
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise ModelNotFoundError(f"model={shown(model)} is no model name: {_WAY_OUT}")
    name = os.fspath(model)
    if name == SHAPES_MODEL:
        return replace(_local_source(name, shapes_folder()), sampling_defaults=dict(SHAPES_CALL))
    path = Path(name).expanduser()
    try:
        if path.is_file() and is_single_file(name):
            return ModelSource(name=name, location=str(path))
        if path.exists():
            return _local_source(name, path)
    except OSError as error:  # too long a name, or a folder that this user may not look into
        raise ModelNotFoundError(f"{shown(name)} cannot be read ({error.strerror}): {_WAY_OUT}") from error
    on_hub = None if isinstance(model, os.PathLike) else hub_file(name)
    if on_hub is not None:
        _require_on_hub(*on_hub)
        return ModelSource(name=name, location=name)
    if isinstance(model, os.PathLike) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        kind = "file" if is_single_file(name) else "folder"
        raise ModelNotFoundError(f"no {kind} {shown(name)}: {_WAY_OUT}")
    if difflib.get_close_matches(name, [SHAPES_MODEL], cutoff=0.8):
        raise ModelNotFoundError(f"unknown model {shown(name)}: did you mean {SHAPES_MODEL}?")
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"unknown model {shown(name)}: {_WAY_OUT}")
    _require_on_hub(name)
    return ModelSource(name=name, location=name)


def source_here(source: ModelSource) -> ModelSource:
    """The source as it is on this machine, for a rank that was started from another one.

    Raises:
        ModelNotFoundError: it is a folder or file, and this machine has none.
    """
    if source.name == SHAPES_MODEL and not os.path.exists(source.location):
        return replace(source, location=str(shapes_folder()))  # the package lies elsewhere here
    for path in (source.location, source.single_file_config):
        if path is not None and os.path.isabs(path) and not os.path.exists(path):
            raise ModelNotFoundError(
                f"machine {platform.node()} has no {shown(path)}: each rank reads the weights on its own machine, so "
                "put them there too, on a disk that all machines share, or name a model on the hub"
            )
    return source


def load_pipeline(
    source: ModelSource,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    decodes: bool = True,
    shares_weights: bool = False,
    quantization: str | None = None,
    offload: str | None = None,
    vae_dtype: str | None = None,
    encodes: Callable[[int], bool] = lambda index: True,
    on_component: OnComponent = lambda name, done, total: None,
) -> Any:
    """Load a pipeline with diffusers' own loader and move it to a device.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None is bfloat16 on CUDA and float32 on the CPU.
        decodes: False where nobody looks at what this process decodes: the weights of its VAE are then read only if
            something needs them after all (see lazy_components).
        shares_weights: this process will keep a part of the transformers' weights, and reads no others then (see
            sharded_loading).
        quantization: how the weights of transformers are quantised while they are read (see fitting).
        offload: "model" or "group", by which diffusers moves parts to the device while they run (see fitting).
        vae_dtype: the name of the VAE's dtype, where it is not ``dtype``.
        encodes: whether this process runs an encoder in every call, by its index in shared_encoders.encoder_names();
            the weights of others are read only if something needs them.
        on_component: called with the name "" when all classes are imported, then before each component is read.

    Raises:
        ModelNotFoundError: files are missing or damaged, or diffusers does not know a class that the model names.
        ConfigError: the model cannot be quantised so, or has no VAE.
        UnsupportedModelError: it cannot be offloaded so.
    """
    import torch
    from diffusers import DiffusionPipeline

    from omni_sp.pipelines.fitting import cast_inputs, dtype_of_components, place, quantized_transformers
    from omni_sp.pipelines.lazy_components import lazy_component, lazy_component_names
    from omni_sp.pipelines.sharded_loading import transformers_to_share, warn_of_whole

    torch_dtype = getattr(torch, dtype or default_dtype(device))
    own_dtype = None if vae_dtype is None else getattr(torch, vae_dtype)
    with quiet_libraries():
        try:
            if is_single_file(source.location):
                _require_folder_for(source, vae_dtype=vae_dtype)
                if shares_weights:
                    warn_of_whole("the transformer", "they are in a single file")
                pipe = _load_single_file(source, torch_dtype, quantization, on_component)
                return place(pipe, device, offload)
            location = _folder(source.location) if shares_weights else source.location
            pipeline_class, classes = _classes(location)
            on_component("", 0, len(classes))
            on = torch.device(device)
            options: dict[str, Any] = {}
            if not offload:  # which moves whatever there is
                lazy = dict.fromkeys(_unread_encoders(classes, location, encodes), torch_dtype)
                if not decodes:
                    lazy |= dict.fromkeys(lazy_component_names(pipeline_class, classes), own_dtype or torch_dtype)
                for name, of_weights in lazy.items():
                    options[name] = lazy_component(classes[name], location, name, dtype=of_weights, device=on)
            if quantization is not None:
                options["quantization_config"] = quantized_transformers(quantization, classes, location)
            if shares_weights:
                options |= transformers_to_share(
                    classes, location, dtype=torch_dtype, device=on, quantization=quantization
                )
            with _loading_reported(on_component):
                dtypes = dtype_of_components(torch_dtype, own_dtype)
                # By its own class, which takes components that it could do without, too.
                pipe = (pipeline_class or DiffusionPipeline).from_pretrained(location, dtype=dtypes, **options)
            if own_dtype not in (None, torch_dtype):
                if "vae" not in classes:
                    raise ConfigError(f"vae_dtype={vae_dtype!r}, and {source.name} has no vae: leave it out")
                cast_inputs(pipe.vae)
        except OmniSPError:
            raise
        except (OSError, ValueError, AttributeError, ImportError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ModelNotFoundError(f"{source.name} cannot be loaded ({type(error).__name__}): {reason}") from error
        except RuntimeError as error:  # of diffusers, which takes bitsandbytes' weights to GPUs alone
            if "No GPU found" not in str(error):
                raise
            raise ConfigError(
                f"{source.name} was quantised when it was saved, by what diffusers runs on GPUs alone, and device is "
                f"{device!r}: take weights that are not, with quantization='int8' where memory is short"
            ) from error
        return place(pipe, device, offload)


def _unread_encoders(classes: Mapping[str, Any], location: str, encodes: Callable[[int], bool]) -> list[str]:
    """The encoders whose weights this process leaves unread, see load_pipeline()."""
    from omni_sp.pipelines.lazy_components import can_be_lazy
    from omni_sp.pipelines.shared_encoders import encoder_names

    left = [name for index, name in enumerate(encoder_names(classes)) if not encodes(index)]
    return [name for name in left if can_be_lazy(classes[name], location, name)]


def import_classes(source: ModelSource) -> None:
    """Import the classes that load_pipeline() will use; of a single file, what all pipelines need."""
    import diffusers.loaders
    import diffusers.pipelines.pipeline_utils  # noqa: F401

    if not is_single_file(source.location):
        with quiet_libraries():
            _classes(source.location)


def _require_folder_for(source: ModelSource, **options: Any) -> None:
    """Refuse options that a model of one file cannot have.

    Raises:
        ConfigError: one of them is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} is for pipelines in folders, and {source.name} is one file: leave it out"
            )


def _load_single_file(source: ModelSource, dtype: Any, quantization: str | None, on_component: OnComponent) -> Any:
    file = local_file(source.location)
    location = source.single_file_config or pipeline_of(file)
    pipeline_class, classes = _classes(location)
    on_component("", 0, len(classes))
    with _loading_reported(on_component):
        return read_pipeline(file, location, pipeline_class, classes, dtype, quantization)


def _folder(location: str) -> str:
    """The folder of a pipeline; one of the hub is fetched, or found in its cache."""
    from diffusers import DiffusionPipeline

    return location if Path(location).is_dir() else str(DiffusionPipeline.download(location))


def default_dtype(device: str) -> str:
    """Return the dtype of a model on this device when the user names none."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def silence_libraries() -> None:
    """Let diffusers and transformers log only errors, and show no progress bars."""
    for library in _library_logs():
        library.set_verbosity_error()
        library.disable_progress_bar()


def silence_downloads() -> None:
    """Show no progress of what is downloaded from the hub."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence diffusers and transformers until the block ends."""
    libraries = _library_logs()
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        silence_libraries()
        yield
    finally:
        for library, (verbosity, has_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if has_bars:
                library.enable_progress_bar()


def _library_logs() -> tuple[Any, ...]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    return diffusers_logging, transformers_logging


def _classes(location: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class and those of its components, imported; None where a class is not a library's own."""
    import importlib

    import diffusers

    index = diffusers.DiffusionPipeline.load_config(location)
    pipeline_class = getattr(diffusers, str(index["_class_name"]), None)
    classes: dict[str, Any] = {}
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            library, class_name = entry
            known = getattr(diffusers.pipelines, library, None)
            if known is None and library in ("diffusers", "transformers"):
                known = importlib.import_module(library)
            classes[name] = getattr(known, class_name, None)
    return pipeline_class, classes


@contextmanager
def _loading_reported(on_component: OnComponent) -> Iterator[None]:
    """Report the components that diffusers' loader reads: its progress bar over them is replaced until the block ends.

    A loader without such a bar reports nothing, and loads all the same.
    """
    from diffusers.utils import logging

    original = logging.tqdm

    def tqdm(*args: Any, **kwargs: Any) -> Any:
        components = args[0] if args else None
        if not str(kwargs.get("desc")).startswith("Loading pipeline") or not isinstance(components, Sized):
            return original(*args, **kwargs)
        return reported(components)

    def reported(components: Any) -> Iterator[Any]:
        for done, entry in enumerate(components):
            on_component(str(entry[0]), done, len(components))
            yield entry

    logging.tqdm = tqdm
    try:
        yield
    finally:
        logging.tqdm = original


def _local_source(name: str, folder: Path) -> ModelSource:
    """A folder that holds a pipeline, or an error that says what it holds instead."""
    if not folder.is_dir():
        if name == SHAPES_MODEL:
            raise ModelNotFoundError(f"the weights of {name} are not part of this installation: reinstall omni-sp")
        raise ModelNotFoundError(f"{name!r} is a file of another kind: {_WAY_OUT}")
    index = folder / _INDEX
    if not index.is_file():
        single = (folder / "config.json").is_file()
        reason = "it holds a single model, not a pipeline" if single else f"it has no {_INDEX}"
        raise ModelNotFoundError(f"{str(folder)!r} is no diffusers pipeline ({reason}): {_WAY_OUT}")
    if "_class_name" not in _read_json(index):
        raise ModelNotFoundError(f"{str(index)!r} names no pipeline class (_class_name): {_WAY_OUT}")
    return ModelSource(name=name, location=str(folder))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"{str(file)!r} holds no JSON object")
    return content


def _require_on_hub(repo: str, file: str = _INDEX) -> None:
    """Refuse a hub id that does not exist, is closed to the user, or lacks the file. One request, without retries."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(repo, file), str):
            get_hf_file_metadata(hf_hub_url(repo, file), timeout=10)
    except Exception as error:
        if isinstance(error, errors.HFValidationError):
            reason = f"unknown model {repo!r}: {_WAY_OUT}"
        elif isinstance(error, errors.GatedRepoError):
            reason = (
                f"{repo} is gated: ask for access at https://huggingface.co/{repo}, then log in with `hf auth login`"
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"no model {repo!r} on the hub (or it is private: log in with `hf auth login`): {_WAY_OUT}"
        elif isinstance(error, errors.EntryNotFoundError):
            is_index = file == _INDEX
            reason = f"{repo} on the hub " + (f"is no diffusers pipeline (no {file})" if is_index else f"has no {file}")
            reason += f": {_WAY_OUT}"
        else:  # which class says "no network" depends on the hub client's version
            reason = f"unknown model {repo!r}: no folder here, not in the hub's cache, and the hub cannot be reached "
            reason += f"({' '.join(str(error).split())}); {_WAY_OUT}"
        raise ModelNotFoundError(reason) from error
