"""Which versions of diffusers and transformers the tests run with: the newest, unless `make test-diffusers-range` runs.

OMNI_SP_DIFFUSERS names the older one that has to be there; else nothing runs.
"""

from __future__ import annotations

import functools
import os

import diffusers
import pytest
import transformers
from packaging.version import Version

EXPECTED = os.environ.get("OMNI_SP_DIFFUSERS")
DIFFUSERS, TRANSFORMERS = Version(diffusers.__version__), Version(transformers.__version__)
if EXPECTED not in (None, diffusers.__version__):
    raise pytest.UsageError(f"OMNI_SP_DIFFUSERS={EXPECTED}, but diffusers {DIFFUSERS} is first on the path")

OFFLOADS_GROUPS_ON_CPU = Version("0.41") <= DIFFUSERS  # before, it needs an accelerator

newest_only = pytest.mark.skipif(EXPECTED is not None, reason="what it reads is written for the newest diffusers")
caches_after_a_call = pytest.mark.skipif(
    Version("0.41") > DIFFUSERS, reason="enable_cache after a call fails in diffusers 0.40, on one process too"
)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(dir(diffusers))


def has(name: str) -> bool:
    """Whether diffusers has a class of this name; it is not imported."""
    return name in _names()
