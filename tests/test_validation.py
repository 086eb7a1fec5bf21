"""Range checks: what they refuse, in which words, and whose error it is."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from omni_sp import ConfigError, DiffusionParallelConfig, OmniDiffusionSamplingParams, SamplingParamsError
from omni_sp.errors import shortened
from omni_sp.validation import nearest, require_int, require_number, require_str, shown


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


def test_lists_of_seeds() -> None:
    seeds = [1, 2**63 - 1]
    params = OmniDiffusionSamplingParams(seed=seeds)
    seeds.append(3)
    assert params.seeds == (1, 2**63 - 1)
    assert OmniDiffusionSamplingParams(seed=7).seeds == (7,)
    assert OmniDiffusionSamplingParams().seeds == ()
    for values, message in [
        ({"seed": []}, "seed is a list of 0, and num_outputs_per_prompt=1"),
        ({"seed": [1, 2], "num_outputs_per_prompt": 3}, "seed is a list of 2, and num_outputs_per_prompt=3"),
        ({"seed": [1, -2]}, r"seed\[1\]=-2: give a whole number"),
        ({"seed": [1, True]}, r"seed\[1\]=True"),
        ({"seed": "12"}, "seed='12'"),
    ]:
        with pytest.raises(SamplingParamsError, match=message) as caught:
            OmniDiffusionSamplingParams(**values)  # type: ignore[arg-type]
        assert caught.value.param == "seed"


@pytest.mark.parametrize("value", [3, ("A",), ("A", 3), ("A", {1: 2}), (1, {}), ["A", {}, {}], {"name": "A"}])
def test_what_names_no_scheduler(value: Any) -> None:
    for good in (None, "A", ("A", {"shift": 3.0}), ["A", {}]):
        assert OmniDiffusionSamplingParams(scheduler=good).scheduler == good  # type: ignore[arg-type]
    with pytest.raises(SamplingParamsError, match="give the name of a diffusers scheduler, or") as caught:
        OmniDiffusionSamplingParams(scheduler=value)
    assert caught.value.param == "scheduler"


@pytest.mark.parametrize("name", ["height", "seed", "guidance_scale", "fps", "num_outputs_per_prompt"])
@pytest.mark.parametrize(
    "value", [10**5000, -(10**5000), [10**5000], "9" * 100_000], ids=["long", "negative", "list", "text"]
)
def test_values_of_any_length_are_refused_in_a_few_words(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        OmniDiffusionSamplingParams(**{name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 500


def test_what_errors_show_of_a_value() -> None:
    for value in (3, -3, 10**39, 1.5, "it's", [1, "a"], {"a": 1}, None, (1,)):
        assert shown(value) == repr(value)
    assert shown(10**5000) == "<a whole number of about 5001 digits>"
    assert shown(-(10**5000)) == "<a whole number of about 5001 digits>"
    for long in ("x" * 10**6, [10**5000] * 1000, {"x" * 10**6: "y" * 10**6}, list(range(10**5))):
        assert len(shown(long)) < 1000


def test_of_a_long_message_the_ends_are_kept() -> None:
    error = ConfigError("what is wrong: " + "y" * 100_000 + ": the way out")
    assert str(error).startswith("what is wrong: yyy")
    assert str(error).endswith("yyy: the way out")
    assert len(str(error)) <= 2000
    assert str(SamplingParamsError("short", param="x")) == "short"
    assert shortened("abc", 3) == "abc"


def test_degrees_without_names_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"DiffusionParallelConfig\(ulysses_degree=2, ring_degree=2\)"):
        DiffusionParallelConfig(2, 2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"has no 'uslyses'; did you mean ulysses_degree\?"):
        DiffusionParallelConfig(uslyses=2)  # type: ignore[call-arg]
    with pytest.raises(SamplingParamsError, match=r"takes its values by name: .*\(height=64, width=64\)"):
        OmniDiffusionSamplingParams(64, 64)  # type: ignore[call-arg]
    with pytest.raises(SamplingParamsError, match=r"has no 'hight'; did you mean height\?"):
        OmniDiffusionSamplingParams(hight=64)  # type: ignore[call-arg]
    config = DiffusionParallelConfig(ulysses_degree=2)
    assert replace(config, ring_degree=3) == pickle.loads(pickle.dumps(replace(config, ring_degree=3)))


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("--bogus", ["--usp", "--ring"], None),
        ("--urp", ["--usp", "--ring"], "--usp"),
        ("uslyses", ["ulysses_degree", "ring_degree"], "ulysses_degree"),
        ("ring", ["ulysses_degree", "ring_degree"], "ring_degree"),
        ("--num-inference-stepps", ["--num-frames", "--num-inference-steps"], "--num-inference-steps"),
        ("max_foo", ["max_sequence_length"], None),
        ("y" * 10_000, ["y"], None),
        ("", ["a"], None),
    ],
)
def test_only_near_names_are_suggested(name: str, known: list[str], near: str | None) -> None:
    assert nearest(name, known) == near


def test_degrees_are_whole_numbers() -> None:
    for value in (0, True, 1.5, -(10**5000)):
        with pytest.raises(ConfigError, match="each degree is a whole number of at least 1"):
            DiffusionParallelConfig(ring_degree=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ring_degree=<a whole number of about 5001 digits>: .* at most 2"):
        DiffusionParallelConfig(ring_degree=10**5000)


@pytest.mark.parametrize(
    ("lora", "adapters"),
    [
        (None, ()),
        ("b", (("b", 1.0),)),
        (("b", 2), (("b", 2.0),)),
        (["b", ("a", -0.5)], (("a", -0.5), ("b", 1.0))),
        ([["b", 0]], (("b", 0.0),)),
        ((), ()),
    ],
)
def test_adapters_of_a_request(lora: Any, adapters: Any) -> None:
    assert OmniDiffusionSamplingParams(lora=lora).adapters == adapters


@pytest.mark.parametrize("lora", [3, {"a": 1.0}, [3], ["a", None], [("a", "1")], [("a", True)], ("a", float("nan"))])
def test_what_names_no_adapter(lora: Any) -> None:
    with pytest.raises(SamplingParamsError, match="give a name, \\(name, scale\\), or a list") as caught:
        OmniDiffusionSamplingParams(lora=lora)
    assert caught.value.param == "lora"


def test_an_adapter_is_named_once() -> None:
    with pytest.raises(SamplingParamsError, match="each adapter is named once"):
        OmniDiffusionSamplingParams(lora=["a", ("a", 2.0)])
