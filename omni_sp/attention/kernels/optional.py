"""Packages that a kernel may need and an installation may lack."""

from __future__ import annotations

import importlib
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from omni_sp.errors import UnsupportedAttentionError


def is_installed(module: str) -> bool:
    """Whether there is such a module, without importing any of its package: a front has no use for a GPU's memory."""
    package, *inner = module.split(".")
    spec, name = find_spec(package), package
    for part in inner:
        locations = None if spec is None else spec.submodule_search_locations
        name = f"{name}.{part}"
        spec = None if locations is None else PathFinder.find_spec(name, list(locations))
    return spec is not None


def optional_function(modules: tuple[str, ...], name: str, install: str) -> Any:
    """The function ``name`` from the first of ``modules`` that is installed.

    Raises:
        UnsupportedAttentionError: none is, or what is installed does not work here; says how to install it.
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
