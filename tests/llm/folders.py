"""Tiny language models saved to a folder, as vLLM's users have them: tokenizer and chat template included.

python -m tests.llm.folders FOLDER [Llama|Mistral|Qwen2|Qwen3]      # random weights: to try commands with
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.pipelines.folders import WORDS, tokenizer

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}make"
LENGTH = 256
_SIZE = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # heads of 32 numbers: the fewest that vLLM's kernels for CPUs know
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def save(folder: Path, kind: str, num_key_value_heads: int) -> Any:
    """Save a model, and give it back as transformers runs it."""
    config = getattr(transformers, f"{kind}Config")(**_SIZE, num_key_value_heads=num_key_value_heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.3 * random if is_norm else 0.15 * random)
    model.save_pretrained(folder)
    words = tokenizer(LENGTH)
    words.chat_template = CHAT
    words.save_pretrained(folder)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    """Token ids without those that mean something."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, _SIZE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]  # type: ignore[arg-type]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers says, token ids."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    row: list[int] = ids[0, len(prompt) :].tolist()
    return row


def held(model: Any) -> dict[str, int]:
    """Bytes of a rank: of the decoder's matrices, of all weights, and of a token's keys and values."""
    matrices = weights = kept = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        weights += parameter.nbytes
        matrices += parameter.nbytes if "_proj.weight" in name else 0
    for layer in model.model.layers:
        attention = layer.self_attn.attn
        kept += 2 * attention.num_kv_heads * attention.head_size * 4
    return {"matrices": matrices, "weights": weights, "kept_per_token": kept}


def forget_threshold(model: Any) -> None:
    """Have a rank measure anew, at its next step, when it is to share tokens."""
    model._shift_parallel._threshold = None


if __name__ == "__main__":
    save(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "Llama", num_key_value_heads=2)
