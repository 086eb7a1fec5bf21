"""Components of a pipeline whose weights are read only when something uses them.

Ranks that stop at the latent do not decode, and an encoder runs on one rank for all. Such a component is built from its
config, so that everything that follows from the config is right, and its weights stay in the file. Whatever does use
them (an image to encode, a picture that all ranks decode, an adapter, or a check) has them read first: that costs time
late, and is never wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from omni_sp.errors import ModelNotFoundError
from omni_sp.pipelines import quirks
from omni_sp.sharding.diffusers_internals import kept_in_float32, without_initialisation

_STORES = ("_parameters", "_buffers", "_modules")
_KEY = "_omni_sp_unread"
_OF_FILES = ("config", "generation_config")
"""Attributes of transformers' models that reading the weights decides: which attention runs, what is generated."""


def lazy_component_names(pipeline_class: Any, classes: dict[str, Any]) -> list[str]:
    """Name the components that only the rank that answers needs. A class that is not a library's own is None."""
    from diffusers import ModelMixin

    if pipeline_class is None:
        return []
    for name in inspect.signature(pipeline_class.__call__).parameters:
        if name.split("_")[-1] in quirks.ENCODED_ARGUMENTS and quirks.NOT_ENCODED not in name:
            return []  # every rank encodes, and should not have to read the weights during the first request
    known = {name: component for name in quirks.DECODERS if isinstance(component := classes.get(name), type)}
    return [name for name, component in known.items() if issubclass(component, ModelMixin)]


def can_be_lazy(component_class: Any, location: str, name: str) -> bool:
    """Whether `lazy_component` can build a component that is no decoder: one of transformers' models, not quantised."""
    from transformers import PreTrainedModel

    if not isinstance(component_class, type) or not issubclass(component_class, PreTrainedModel):
        return False
    return getattr(_config(component_class, location, name), "quantization_config", None) is None


def lazy_component(
    component_class: Any, location: str, name: str, *, dtype: torch.dtype, device: torch.device, **options: Any
) -> Any:
    """Build a component without its weights, otherwise as ``component_class.from_pretrained`` would.

    The first access to a submodule, a parameter or a buffer reads the weights.

    Args:
        component_class: the class.
        location: of the pipeline.
        name: of the component.
        dtype: of its weights.
        device: where these belong.
        **options: of ``from_pretrained``, which reads them.
    """

    def read() -> Any:
        # A call may be under way that uses the global generator, which must stay equal on all ranks.
        with torch.random.fork_rng(devices=[]):
            return component_class.from_pretrained(location, subfolder=name, dtype=dtype, **options).to(device)

    component = _without_weights(component_class, location, name, dtype)
    names = {"__module__": component_class.__module__, "__qualname__": component_class.__qualname__}
    vars(component)[_KEY] = (component_class, name, read, device)
    component.__class__ = type(component_class.__name__, (_LazyWeights, component_class), names)
    return component


def _from_config(component_class: Any, location: str, name: str) -> Any:
    if hasattr(component_class, "load_config"):
        return component_class.from_config(component_class.load_config(location, subfolder=name))
    return component_class(_config(component_class, location, name))


def _config(component_class: Any, location: str, name: str) -> Any:
    """Of one of transformers' models."""
    return component_class.config_class.from_pretrained(location, subfolder=name)


def has_unread_weights(component: Any) -> bool:
    """Whether a component is lazy, and nothing has needed its weights yet."""
    return isinstance(component, _LazyWeights)


def read_weights(component: Any) -> None:
    """Read what a lazy component has left unread; nothing to do for any other."""
    if isinstance(component, _LazyWeights):
        component.read()


def leave_unread(component: Any) -> bool:
    """Make a lazy component one of its own class, with weights on the meta device, for the caller to give it others.

    Returns:
        Whether its weights were unread until now. Any other component stays as it is.
    """
    if not isinstance(component, _LazyWeights):
        return False
    component_class, *_ = vars(component).pop(_KEY)
    component.__class__ = component_class
    return True


def _without_weights(component_class: Any, location: str, name: str, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` builds, with parameters on the meta device."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: buffers are computed in it
    try:
        with without_initialisation(), init_empty_weights():
            component = _from_config(component_class, location, name)
    finally:
        torch.set_default_dtype(before)
    in_float32 = {*kept_in_float32(component_class)}
    for path, weight in component.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype if in_float32.isdisjoint(path.split(".")) else torch.float32)
    return component.eval()


def _after_reading(method: str) -> Callable[..., Any]:
    """A method that reads the weights, and then is that of the component's own class."""

    def read_first(component: Any, *args: Any, **kwargs: Any) -> Any:
        read_weights(component)
        return getattr(type(component), method)(component, *args, **kwargs)

    return read_first


class _LazyWeights:
    """A base put before a component's class: torch's modules look up in ``__getattr__`` whatever holds weights."""

    def __getattr__(self, name: str) -> Any:
        if any(name in vars(self)[store] for store in _STORES):
            self.read()
            return getattr(self, name)
        return super().__getattr__(name)  # type: ignore[misc]  # a torch module's

    @property
    def device(self) -> torch.device:
        """Where the weights belong: a pipeline's device is that of its first component."""
        device: torch.device = vars(self)[_KEY][3]
        return device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing for the device where the weights belong already; read them for anything else."""
        targets = [torch.device(one) if isinstance(one, str) else one for one in (*args, *kwargs.values())]
        if any(one not in (None, self.device) for one in targets):
            self.read()
            return self.to(*args, **kwargs)
        return self

    # Loaders of pipelines walk over all modules; these methods are for who needs the weights, or adds some. A forward
    # may put hooks on its modules before it calls any.
    forward = _after_reading("forward")
    state_dict = _after_reading("state_dict")
    load_state_dict = _after_reading("load_state_dict")
    load_adapter = _after_reading("load_adapter")
    add_adapter = _after_reading("add_adapter")
    _apply = _after_reading("_apply")

    def read(self) -> None:
        """Take the weights out of the file."""
        component_class, name, read, _ = vars(self)[_KEY]
        try:
            component = read()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelNotFoundError(
                f"the weights of {name} ({component_class.__name__}), which this rank had left unread until now, "
                f"cannot be read ({type(error).__name__}): {reason}"
            ) from error
        for store in _STORES:
            vars(self)[store] = vars(component)[store]
        vars(self).update({name: vars(component)[name] for name in _OF_FILES if name in vars(component)})
        del vars(self)[_KEY]
        self.__class__ = component_class
