"""Packages that a kernel needs and an installation may lack."""

from __future__ import annotations

import importlib
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from omni_sp.errors import UnsupportedAttentionError


def is_installed(module: str) -> bool:
    """Whether a module is installed. Nothing of its package is imported: that could allocate a GPU's memory."""
    package, *inner = module.split(".")
    spec, name = find_spec(package), package
    for component in inner:
        locations = None if spec is None else spec.submodule_search_locations
        name = f"{name}.{component}"
        spec = None if locations is None else PathFinder.find_spec(name, list(locations))
    return spec is not None


def optional_function(modules: tuple[str, ...], name: str, install: str) -> Any:
    """The function of the first module that can be imported; ``install`` is the command that the error advises.

    The error covers modules that are not installed, and those that do not work on this machine.
    """
    reasons = []
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            # OSError and RuntimeError: a binary for another torch, or for a GPU that is not there.
            reasons.append(f"{module}: {' '.join(str(error).split())}")
    raise UnsupportedAttentionError(
        f"this kernel needs a package that is not usable here ({'; '.join(reasons)}): {install}"
    )
