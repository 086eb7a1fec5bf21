"""Parts of a pipeline whose weights are read only where something uses them.

Ranks that stop at the latent never decode. Their VAE is built from its config, so that everything that follows from it
holds, and its weights stay in the file. Whatever does reach for them (a picture to encode, a check, which decodes on
every rank) has them read then: it may come late, but never wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from omni_sp.errors import ModelNotFoundError
from omni_sp.pipelines.quirks import DECODERS, ENCODED_ARGUMENTS, NOT_ENCODED

_STORES = ("_parameters", "_buffers", "_modules")
_KEY = "_omni_sp_unread"


def lazy_component_names(pipeline_class: Any, classes: dict[str, Any]) -> list[str]:
    """Names of the parts that only the rank that answers needs.

    Args:
        pipeline_class: the pipeline's. classes: of its parts, by name. None for what is no library's own.
    """
    from diffusers import ModelMixin

    if pipeline_class is None:
        return []
    arguments = inspect.signature(pipeline_class.__call__).parameters
    encodes = [name for name in arguments if name.split("_")[-1] in ENCODED_ARGUMENTS and NOT_ENCODED not in name]
    if encodes:  # every rank encodes; not at its first request
        return []
    return [name for name in DECODERS if isinstance(classes.get(name), type) and issubclass(classes[name], ModelMixin)]


def lazy_component(part_class: Any, location: str, name: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A part of a pipeline without its weights, as ``part_class.from_pretrained`` would give it but for them.

    The first look at a submodule, a parameter or a buffer has the weights read.

    Args:
        location: the pipeline's folder or hub id. name: the part's. device: where the weights would be.
    """
    from accelerate import init_empty_weights

    def read() -> Any:
        # The call under way may be drawing from the global generator, as every other rank does.
        with torch.random.fork_rng(devices=[]):
            return part_class.from_pretrained(location, subfolder=name, dtype=dtype).to(device)

    with init_empty_weights():
        part = part_class.from_config(part_class.load_config(location, subfolder=name))
    part = part.to(dtype).eval()
    kind = {"__module__": part_class.__module__, "__qualname__": part_class.__qualname__}
    vars(part)[_KEY] = (part_class, name, read, device)
    part.__class__ = type(part_class.__name__, (_LazyWeights, part_class), kind)
    return part


def has_unread_weights(part: Any) -> bool:
    """True for a part whose weights nothing has needed yet."""
    return isinstance(part, _LazyWeights)


class _LazyWeights:
    """Put before the class of a part: torch's modules look up in ``__getattr__`` whatever holds weights."""

    def __getattr__(self, name: str) -> Any:
        if any(name in vars(self)[store] for store in _STORES):
            self._read()
            return getattr(self, name)
        return super().__getattr__(name)  # type: ignore[misc]  # a torch module's

    @property
    def device(self) -> torch.device:
        """Where the weights would be: pipelines ask their first part where to work."""
        device: torch.device = vars(self)[_KEY][3]
        return device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Stay where the weights would be; to go elsewhere, they are read."""
        asked = [torch.device(one) if isinstance(one, str) else one for one in (*args, *kwargs.values())]
        if any(one not in (None, self.device) for one in asked):
            self._read()
            return self.to(*args, **kwargs)
        return self

    def _read(self) -> None:
        part_class, name, read, _ = vars(self)[_KEY]
        try:
            part = read()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelNotFoundError(
                f"the weights of {name} ({part_class.__name__}), which this rank had left unread until now, cannot be "
                f"read ({type(error).__name__}): {reason}"
            ) from error
        for store in _STORES:
            vars(self)[store] = vars(part)[store]
        del vars(self)[_KEY]
        self.__class__ = part_class
