"""Tiny language models with random weights that are zero nowhere, the same in every process."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from omni_sp import DiffusionParallelConfig

VOCABULARY = 97
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen2, bias": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3, norms": ("Qwen3", {"num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"num_key_value_heads": 6, "sliding_window": None, "tie_word_embeddings": True}),
    "windows": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 20}),
    "yarn": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    ),
    "growing": ("Llama", {"num_key_value_heads": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
}
NAMES = ("llama, one kv head", "qwen2, bias", "qwen3, norms", "mistral")


def config(name: str, **changes: Any) -> Any:
    kind, own = _MODELS[name]
    return getattr(transformers, f"{kind}Config")(**{**_SIZE, **own, **changes})


def model(name: str, suffix: str = "ForCausalLM", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """In eval mode, on the CPU."""
    kind, _ = _MODELS[name]
    made = getattr(transformers, kind + suffix)(config(name, **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                spread = parameter.shape[-1] ** -0.5
                parameter.copy_(1.5 * spread * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return torch.randint(VOCABULARY, (batch, tokens), generator=generator)


def padded(lengths: tuple[int, ...], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths in one batch, and their mask."""
    longest = max(lengths)
    ids, mask = prompt(longest, len(lengths)), torch.zeros(len(lengths), longest, dtype=torch.int64)
    for index, length in enumerate(lengths):
        mask[index, longest - length :] = 1
        if side == "right":
            mask[index] = mask[index].flip(0)
    return ids.masked_fill(mask == 0, 5), mask


def one_rank() -> DiffusionParallelConfig:
    return DiffusionParallelConfig()
