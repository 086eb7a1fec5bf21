"""Language models over ranks that share a prompt's tokens, inside vLLM or with plain transformers; embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_sp.llm.embedding.client import AsyncEmbeddingClient as AsyncEmbeddingClient
    from omni_sp.llm.embedding.client import EmbeddingClient as EmbeddingClient
    from omni_sp.llm.hf.model import parallelize as parallelize
    from omni_sp.llm.vllm.llm import LLM as LLM

__all__ = ["LLM", "AsyncEmbeddingClient", "EmbeddingClient", "parallelize"]

_CLIENT = "omni_sp.llm.embedding.client"
_MODULES = {
    "LLM": "omni_sp.llm.vllm.llm",
    "AsyncEmbeddingClient": _CLIENT,
    "EmbeddingClient": _CLIENT,
    "parallelize": "omni_sp.llm.hf.model",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: ``LLM`` needs vLLM, the others do not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
