"""Where a diffusers lacks something private, the error says what is missing."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

from omni_sp.errors import UnsupportedModelError
from omni_sp.sharding.attention_backend import backend_key, tracking_flex_attention
from omni_sp.sharding.diffusers_internals import (
    HOOK_REGISTRY,
    active_attention_backend,
    attention_backends,
    flex_attention_key,
    hook_and_forward_below,
)
from omni_sp.sharding.foreign_code import has_foreign_code


def test_this_version_has_what_we_use() -> None:
    assert backend_key() in attention_backends()
    assert backend_key() is backend_key()
    assert flex_attention_key() in attention_backends()


@pytest.mark.parametrize("name", ["_AttentionBackendRegistry", "AttentionBackendName"])
def test_without_the_registry_the_error_names_the_tested_versions(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Registry:
        _backends: dict[Any, Any] = {}  # noqa: RUF012  # as in diffusers

    monkeypatch.setattr(attention_dispatch, "_AttentionBackendRegistry", Registry)
    monkeypatch.delattr(attention_dispatch, name)
    with pytest.raises(UnsupportedModelError, match=r"attention backends.*use 0\.40\.0 to"):
        backend_key()


def test_the_active_backend_is_the_one_that_diffusers_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with attention_dispatch.attention_backend("flex"):
        assert active_attention_backend() is flex_attention_key()
    assert active_attention_backend() is not flex_attention_key()
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, "_active_backend")
    with pytest.raises(UnsupportedModelError, match="active attention backend"):  # a ValueError: nothing is replayed
        active_attention_backend()


def test_without_flex_attention_there_is_nothing_to_track(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = attention_backends()
    monkeypatch.delitem(backends, flex_attention_key())
    before = dict(backends)
    with tracking_flex_attention():
        assert dict(backends) == before


def test_a_hook_that_is_kept_elsewhere_is_foreign() -> None:
    module = torch.nn.Linear(2, 2)

    def forward(_module: Any, *args: Any) -> Any:
        return torch.nn.Linear.forward(module, *args)

    code = types.FunctionType(
        forward.__code__, {"__name__": HOOK_REGISTRY, "torch": torch}, closure=forward.__closure__
    )
    assert hook_and_forward_below(code) is None
    module.forward = functools.partial(code, module)  # type: ignore[method-assign]
    assert has_foreign_code(module)
