"""The names that users type are pinned."""

from __future__ import annotations

import subprocess
import sys

import pytest

import omni_sp
import omni_sp.attention
from omni_sp import ConfigError, DiffusionParallelConfig, OmniDiffusionSamplingParams, SamplingParamsError


def test_top_level_names() -> None:
    assert set(omni_sp.__all__) == {
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
    }
    assert all(hasattr(omni_sp, name) for name in omni_sp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Omnibus'"):
        _ = omni_sp.Omnibus


def test_attention_names() -> None:
    assert {"sequence_parallel_attention", "SequenceLayout", "kernel_names"} <= set(omni_sp.attention.__all__)


def test_importing_is_light() -> None:
    """Neither torch nor diffusers is loaded before something needs it."""
    program = "import sys, omni_sp; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["cfg_parallel_size", "ulysses_degree", "ring_degree"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_degrees_are_whole_numbers_from_one(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        DiffusionParallelConfig(**{name: value})  # type: ignore[arg-type]


def test_config_says_its_equation() -> None:
    config = DiffusionParallelConfig(ulysses_degree=3, ring_degree=2)
    assert config.world_size == 6
    assert config.equation == "ulysses_degree 3 × ring_degree 2 = 6 ranks"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 0),
        ("width", 2.0),
        ("num_inference_steps", -3),
        ("seed", -1),
        ("seed", 2**63),
        ("guidance_scale", float("nan")),
        ("negative_prompt", 3),
        ("extra_args", [1]),
    ],
)
def test_sampling_params_are_checked(name: str, value: object) -> None:
    with pytest.raises(SamplingParamsError, match=f"{name}="):
        OmniDiffusionSamplingParams(**{name: value})  # type: ignore[arg-type]
