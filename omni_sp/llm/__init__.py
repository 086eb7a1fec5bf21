"""Long prompts sooner: Llama, Mistral and Qwen over ranks that share a prompt's tokens, inside vLLM or without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_sp.llm.hf.model import parallelize as parallelize
    from omni_sp.llm.vllm.llm import LLM as LLM

__all__ = ["LLM", "parallelize"]

_HOMES = {"LLM": "omni_sp.llm.vllm.llm", "parallelize": "omni_sp.llm.hf.model"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that neither door needs the packages of the other."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
