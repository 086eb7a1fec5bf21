"""Omni-SP: one picture, one video or one long prompt, faster: its tokens spread over several GPUs, exactly.

The names below are the public surface. They are loaded on first use, so that ``import omni_sp`` and
``omni-sp --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.errors import (
    CallFailedError,
    ConfigError,
    EngineClosedError,
    EngineError,
    InvalidInputError,
    ModelNotFoundError,
    NonFiniteResultError,
    OmniSPError,
    QueueFullError,
    RankFailedError,
    RequestAbortedError,
    SamplingParamsError,
    ShardingError,
    UnsupportedAttentionError,
    UnsupportedModelError,
)
from omni_sp.version import __version__

if TYPE_CHECKING:
    from omni_sp.async_omni import AsyncOmni
    from omni_sp.mesh import ParallelMesh
    from omni_sp.omni import Omni
    from omni_sp.outputs import OmniRequestOutput
    from omni_sp.pipelines.parallelize import parallelize

_LAZY = {
    "AsyncOmni": "omni_sp.async_omni",
    "Omni": "omni_sp.omni",
    "OmniRequestOutput": "omni_sp.outputs",
    "ParallelMesh": "omni_sp.mesh",
    "parallelize": "omni_sp.pipelines.parallelize",
}

__all__ = [
    "AsyncOmni",
    "CallFailedError",
    "ConfigError",
    "DiffusionParallelConfig",
    "EngineClosedError",
    "EngineError",
    "InvalidInputError",
    "ModelNotFoundError",
    "NonFiniteResultError",
    "Omni",
    "OmniDiffusionSamplingParams",
    "OmniRequestOutput",
    "OmniSPError",
    "ParallelMesh",
    "QueueFullError",
    "RankFailedError",
    "RequestAbortedError",
    "SamplingParamsError",
    "ShardingError",
    "UnsupportedAttentionError",
    "UnsupportedModelError",
    "__version__",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'omni_sp' has no attribute {name!r}")
