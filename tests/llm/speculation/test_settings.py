"""Options of speculation by both vocabularies, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.settings import SpeculationSettings


@pytest.fixture(autouse=True)
def has_arctic(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are importable, as far as the settings look."""
    packages: list[str] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages if "arctic" in name else find(name))
    return packages


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "suffix"}, {}),
        ({"method": "arctic", "enable_suffix_decoding": True}, {}),
        ({"method": "suffix", "num_speculative_tokens": 8}, {"num_speculative_tokens": 8}),
        (
            {
                "method": "suffix",
                "suffix_decoding_max_tree_depth": 24,
                "suffix_decoding_max_cached_requests": 9,
                "suffix_decoding_max_spec_factor": 2,
                "suffix_decoding_min_token_prob": 0.2,
            },
            {"max_depth": 24, "max_requests": 9, "max_spec_factor": 2, "min_token_prob": 0.2},
        ),
        (
            {
                "method": "arctic",
                "enable_suffix_decoding": True,
                "suffix_cache_max_depth": 24,
                "suffix_cache_max_requests": 0,
                "suffix_max_spec_factor": 2.0,
                "suffix_max_spec_offset": -1,
                "suffix_min_token_prob": 0.2,
                "disable_by_batch_size": None,
            },
            {
                "max_depth": 24,
                "max_requests": 0,
                "max_spec_factor": 2.0,
                "max_spec_offset": -1,
                "min_token_prob": 0.2,
                "disable_by_batch_size": None,
            },
        ),
    ],
)
def test_both_vocabularies(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SpeculationSettings.from_config(options) == SpeculationSettings(**expected)
    assert SpeculationSettings.from_config(json.dumps(options)) == SpeculationSettings(**expected)


@pytest.mark.parametrize("options", [None, "{", "[]", {}, {"method": "ngram"}, {"method": "eagle3", "model": "x"}])
def test_other_methods_are_vllms(options: Any) -> None:
    assert SpeculationSettings.from_config(options) is None


def test_suffix_decoding_is_vllms_own_where_its_package_is_installed_and_no_option_is_ours(
    has_arctic: list[str],
) -> None:
    has_arctic.append("arctic_inference")
    stock = {"method": "suffix", "suffix_decoding_max_tree_depth": 24}
    assert SpeculationSettings.from_config(stock) is None
    assert SpeculationSettings.from_config(stock | {"disable_by_batch_size": 8}) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "suffix", "suffix_max_depth": 3}, "nearest is 'suffix_cache_max_depth'"),
        ({"method": "suffix", "max_tree": 3}, "'max_tree'"),
        ({"suffix_min_token_prob": 0.1, "suffix_decoding_min_token_prob": 0.1}, "give one of them"),
        ({"num_speculative_tokens": 0}, "from 1 on"),
        ({"num_speculative_tokens": 129}, "up to 128"),
        ({"suffix_cache_max_depth": "3"}, "whole number"),
        ({"suffix_cache_max_requests": -1}, "from 0 on"),
        ({"suffix_cache_max_requests": 2**31}, "up to 2147483647"),
        ({"suffix_max_spec_factor": float("inf")}, "give a number"),
        ({"suffix_max_spec_offset": float("nan")}, "give a number"),
        ({"disable_by_batch_size": 0}, "no limit"),
        ({"suffix_max_spec_factor": -1.0}, "from 0 on"),
        ({"suffix_max_spec_factor": "1"}, "give a number"),
        ({"suffix_min_token_prob": 1.5}, "from 0 to 1"),
        ({"method": "arctic"}, "drafts nothing"),
        ({"method": "arctic", "enable_suffix_decoding": "yes"}, "enable_suffix_decoding='yes'"),
        ({"method": "arctic", "model": "no-such-folder"}, "no-such-folder/config.json cannot be read"),
        ({"method": "arctic", "model": 3}, "model=3"),
        ({"model": "x"}, "no option 'model'"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationSettings.from_config({"method": "suffix"} | options)


@pytest.fixture
def speculator(tmp_path: Path) -> str:
    """A folder whose speculator drafts three tokens."""
    config = {"architectures": "MLPSpeculatorPreTrainedModel", "n_predict": 3, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config | {"emb_dim": 8, "inner_dim": 4}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected", "longest"),
    [
        ({}, {"head_tokens": 3, "enable_suffix": False}, 3),
        ({"num_speculative_tokens": 2}, {"head_tokens": 2, "enable_suffix": False}, 2),
        (
            {"enable_suffix_decoding": True, "disable_by_batch_size": 8},
            {"head_tokens": 3, "disable_by_batch_size": 8},
            32,
        ),
        ({"enable_suffix_decoding": True, "num_speculative_tokens": 1}, {"head_tokens": 1}, 32),
    ],
)
def test_a_speculator_alone_and_beside_suffix_decoding(
    speculator: str, options: dict[str, Any], expected: dict[str, Any], longest: int
) -> None:
    settings = SpeculationSettings.from_config({"method": "arctic", "model": speculator, **options})
    assert settings == SpeculationSettings(head=speculator, **expected)
    assert settings.for_vllm()["num_speculative_tokens"] == longest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": 4}, "drafts from 1 to 3 tokens"),
        ({"enable_sufix_decoding": True}, "nearest is 'enable_suffix_decoding'"),
        ({"modell": "x"}, "nearest is 'model'"),
    ],
)
def test_invalid_options_of_a_speculator_are_refused(speculator: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationSettings.from_config({"method": "arctic", "model": speculator, **options})
