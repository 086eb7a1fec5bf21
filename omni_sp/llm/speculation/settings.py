"""Options of speculation, by the names of vLLM and of Arctic Inference."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_sp.errors import ConfigError
from omni_sp.llm.speculation.checkpoint import read_config
from omni_sp.validation import require_bool, require_int, require_str

PROPOSER = "omni_sp.llm.speculation.proposer.Proposer"
WORKER = "omni_sp.llm.speculation.worker.Worker"
_METHODS = ("suffix", "arctic")
_MOST = 2**31 - 1
_MOST_DRAFTED = 128
"""Tokens of a draft that vLLM verifies at most."""
_DRAFTERS = ("model", "enable_suffix_decoding")
# Our field -> vLLM's name and Arctic's. What vLLM's own suffix decoding does not know is Arctic's alone.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_speculative_tokens": ("num_speculative_tokens",),
    "max_depth": ("suffix_decoding_max_tree_depth", "suffix_cache_max_depth"),
    "max_requests": ("suffix_decoding_max_cached_requests", "suffix_cache_max_requests"),
    "max_spec_factor": ("suffix_decoding_max_spec_factor", "suffix_max_spec_factor"),
    "max_spec_offset": ("suffix_max_spec_offset",),
    "min_token_prob": ("suffix_decoding_min_token_prob", "suffix_min_token_prob"),
    "disable_by_batch_size": ("disable_by_batch_size",),
}
_VLLM_NAMES = {"num_speculative_tokens", *(names[0] for names in _NAMES.values() if names[0].startswith("suffix_d"))}

SHORT_OPTIONS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
"""vLLM's options of single entries -> the entry of ``speculative_config``."""


@dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """How drafts are made.

    Attributes:
        num_speculative_tokens: the most tokens of a draft by suffix decoding; vLLM verifies up to 128.
        max_depth: up to how many of the last tokens are compared.
        max_requests: answers of so many of the latest requests are kept for others; 0 keeps none.
        max_spec_factor: a draft has at most ``max_spec_factor * match + max_spec_offset`` tokens, where ``match``
            tokens agreed.
        max_spec_offset: see ``max_spec_factor``.
        min_token_prob: a draft ends before a token whose estimated probability, of it and all before it, is lower.
        disable_by_batch_size: no drafts in a step of more requests; None: no such limit.
        enable_suffix: draft by suffix decoding.
        head: the folder or hub id of a trained speculator; None: none drafts.
        head_tokens: tokens of its drafts. Beside it, suffix decoding drafts where it expects to be right as often.
    """

    num_speculative_tokens: int = 32
    max_depth: int = 64
    max_requests: int = 10_000
    max_spec_factor: float = 1.0
    max_spec_offset: float = 0.0
    min_token_prob: float = 0.1
    disable_by_batch_size: int | None = 64
    enable_suffix: bool = True
    head: str | None = None
    head_tokens: int = 0

    def __post_init__(self) -> None:
        bounds = {"num_speculative_tokens": (1, _MOST_DRAFTED), "max_depth": (1, _MOST), "max_requests": (0, _MOST)}
        for name, (minimum, maximum) in bounds.items():
            hint = f"give a whole number from {minimum} on, up to {maximum}"
            require_int(name, getattr(self, name), minimum=minimum, maximum=maximum, error=ConfigError, hint=hint)
        if self.disable_by_batch_size is not None:
            hint = "give a number of requests from 1 on, or null for no limit"
            require_int("disable_by_batch_size", self.disable_by_batch_size, minimum=1, error=ConfigError, hint=hint)
        for name in ("max_spec_factor", "max_spec_offset", "min_token_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r}: give a number")
        if not self.max_spec_factor >= 0:
            raise ConfigError(f"max_spec_factor={self.max_spec_factor}: give a number from 0 on")
        if not 0 <= self.min_token_prob <= 1:
            raise ConfigError(f"min_token_prob={self.min_token_prob}: give a number from 0 to 1")

    @classmethod
    def from_config(cls, speculative_config: str | Mapping[str, Any] | None) -> SpeculationSettings | None:
        """The settings in a ``speculative_config``; None where it is vLLM's own matter.

        That is every method but "suffix" and "arctic", and "suffix" where vLLM has the arctic_inference that its own
        suffix decoding needs, unless an option is given that only we know.

        Raises:
            ConfigError: an option is unknown, is given twice or has an invalid value.
        """
        options = parse(speculative_config)
        method = options.pop("method", None)
        if method not in _METHODS:
            return None
        if method == "suffix" and _VLLM_NAMES.issuperset(options) and importlib.util.find_spec("arctic_inference"):
            return None
        values: dict[str, Any] = {}
        if method == "arctic":
            values = _take_drafters(options)
        else:
            options.pop("enable_suffix_decoding", None)
        known = [name for names in _NAMES.values() for name in names]
        fields = {name: field for field, names in _NAMES.items() for name in names}
        for name, value in options.items():
            if name not in fields:
                others = _DRAFTERS if method == "arctic" else ()
                near = difflib.get_close_matches(name, [*known, *others, "method"], n=1, cutoff=0.0)
                raise ConfigError(f"speculative_config has no option {name!r}; the nearest is {near[0]!r}")
            if fields[name] in values:
                raise ConfigError(f"speculative_config gives {' and '.join(_NAMES[fields[name]])}: give one of them")
            values[fields[name]] = value
        return cls(**values)

    def for_vllm(self) -> dict[str, Any]:
        """The ``speculative_config`` by which stock vLLM makes our proposer."""
        longest = max(self.head_tokens, self.num_speculative_tokens if self.enable_suffix else 0)
        return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": longest}


def with_short_options(
    speculative_config: str | Mapping[str, Any] | None, given: Mapping[str, Any]
) -> str | Mapping[str, Any] | None:
    """A ``speculative_config`` with what vLLM's options of single entries give, by their names in ``SHORT_OPTIONS``.

    Raises:
        ConfigError: both give an entry.
    """
    if not given or (isinstance(speculative_config, str) and not parse(speculative_config)):
        return speculative_config  # vLLM has a message for what cannot be read
    entries = parse(speculative_config)
    for name, value in given.items():
        if SHORT_OPTIONS[name] in entries:
            raise ConfigError(f"{name} and the {SHORT_OPTIONS[name]!r} of speculative_config: give one of them")
        entries[SHORT_OPTIONS[name]] = value
    return entries


def parse(speculative_config: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A ``speculative_config`` as a dict; empty where it is none, for which vLLM has a message."""
    if isinstance(speculative_config, str):
        try:
            speculative_config = json.loads(speculative_config)
        except ValueError:
            return {}
    return dict(speculative_config) if isinstance(speculative_config, Mapping) else {}


def _take_drafters(options: dict[str, Any]) -> dict[str, Any]:
    """Take from the options of method "arctic" what says who drafts, as values of fields."""
    head, is_suffix = options.pop("model", None), options.pop("enable_suffix_decoding", False)
    require_bool("enable_suffix_decoding", is_suffix, error=ConfigError)
    if head is None:
        if not is_suffix:
            raise ConfigError(
                "speculative_config with the method 'arctic' drafts nothing: give 'model', the folder or hub id of a "
                "trained speculator, or 'enable_suffix_decoding': true, or both"
            )
        return {}
    require_str("model", head, error=ConfigError)
    drafts = read_config(head).n_predict
    # As in Arctic: beside a speculator, the number is about its drafts, and those of suffix decoding may be longer.
    count = options.pop("num_speculative_tokens", drafts)
    hint = f"the speculator {head} drafts from 1 to {drafts} tokens"
    require_int("num_speculative_tokens", count, minimum=1, maximum=drafts, error=ConfigError, hint=hint)
    return {"head": head, "head_tokens": count, "enable_suffix": is_suffix}
