"""Range checks: what they refuse, in which words, and whose error it is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from omni_sp import ConfigError, DiffusionParallelConfig, OmniDiffusionSamplingParams, SamplingParamsError
from omni_sp.validation import require_int, require_number, require_str


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 11])
def test_whole_numbers(value: Any) -> None:
    assert require_int("n", 10, minimum=1, maximum=10, error=ConfigError) == 10
    with pytest.raises(ConfigError) as caught:
        require_int("n", value, minimum=1, maximum=10, error=ConfigError)
    assert str(caught.value) == f"n={value!r}: give a whole number of at least 1"


@pytest.mark.parametrize("value", [False, "1", None, math.nan, math.inf, 10**400, 0, 5])
def test_numbers(value: Any) -> None:
    assert require_number("x", 1, above=0, below=5, error=ConfigError) == 1.0
    with pytest.raises(SamplingParamsError, match="give a finite number") as caught:
        require_number("x", value, above=0, below=5, error=partial(SamplingParamsError, param="x"))
    assert caught.value.param == "x"


def test_strings() -> None:
    assert require_str("s", "", error=ConfigError) == ""
    with pytest.raises(ConfigError, match="s=3: give a string"):
        require_str("s", 3, error=ConfigError)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("height", 0, "give a whole number of at least 1"),
        ("num_frames", 1.5, "give a whole number of at least 1"),
        ("num_outputs_per_prompt", True, "give a whole number of at least 1"),
        ("true_cfg_scale", math.nan, "give a finite number"),
        ("fps", math.inf, "give a finite number"),
        ("fps", 0, "give a number above 0"),
        ("seed", -1, "give a whole number from 0 to 2**63-1"),
        ("seed", 2**63, "give a whole number from 0 to 2**63-1"),
        ("negative_prompt", 1, "give a string"),
        ("output_type", 1, "give a string"),
    ],
)
def test_sampling_params_name_what_is_out_of_range(name: str, value: Any, hint: str) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        OmniDiffusionSamplingParams(**{name: value})
    assert (caught.value.param, str(caught.value)) == (name, f"{name}={value!r}: {hint}, or leave it out")


def test_degrees_are_whole_numbers() -> None:
    for value in (0, True, 1.5):
        with pytest.raises(ConfigError, match="each degree is a whole number of at least 1"):
            DiffusionParallelConfig(ring_degree=value)  # type: ignore[arg-type]
