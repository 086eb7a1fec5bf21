"""The tokenizer and text encoder stages.

The text encoder learns to name a caption's shape, colours, size and position from the hidden states of the template's
last tokens, which are the same for every prompt.  It is then frozen: the transformer finds each attribute there.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from training.shapes.settings import Settings
from training.shapes.world import COLOURS, POSITIONS, SHAPES, SIZES, Scene, num_captions, random_scene

__all__ = [
    "load_text_encoder",
    "load_tokenizer",
    "random_caption",
    "text_pipeline",
    "train_text_encoder",
    "train_tokenizer",
]

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The tokens after the prompt: <|im_end|>, line feed, <|im_start|>, assistant, line feed.
_NUM_LAST_TOKENS = 5
_ATTRIBUTES = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "background": list(COLOURS),
    "size": list(SIZES),
    "position": list(POSITIONS),
}
_BATCH_SIZE = 64
_MAX_LEARNING_RATE = 4e-3


def text_pipeline(
    tokenizer: Qwen2Tokenizer, text_encoder: Qwen2_5_VLForConditionalGeneration | None = None
) -> QwenImagePipeline:
    """Return the pipeline with its text parts alone: it knows the prompt template and how to embed prompts."""
    return QwenImagePipeline(scheduler=None, vae=None, text_encoder=text_encoder, tokenizer=tokenizer, transformer=None)


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of its paraphrases, now and then with a capital letter or a full stop."""
    caption = scene.caption(int(rng.integers(num_captions())))
    caption = caption[0].upper() + caption[1:] if rng.random() < 0.15 else caption
    return caption + "." if rng.random() < 0.15 else caption


def train_tokenizer() -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer in which every word of the template and the captions is one token.

    Raises:
        ValueError: If the template's prefix is not as long as the part of it that the pipeline drops.
    """
    template = text_pipeline(Qwen2Tokenizer()).prompt_template_encode
    for token in _SPECIAL_TOKENS:
        template = template.replace(token, "\n")
    rng = np.random.default_rng(0)
    # Every word occurs several times, so every merge within a word is learned and nothing is left out as too rare.
    corpus = [template] * 8 + [random_caption(random_scene(rng), rng) for _ in range(4000)]
    # The splitting into words is the class's own; byte 0 to 255 are in the alphabet, so any text can be encoded.
    splitter = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    )
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=_merges(bpe),
        extra_special_tokens=list(_SPECIAL_TOKENS[1:]),
        model_max_length=1024,
    )
    _check_prefix(tokenizer)
    return tokenizer


def load_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Load a trained tokenizer."""
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    return tokenizer


def load_text_encoder(folder: Path, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """Load a trained text encoder in float32."""
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return encoder.eval().to(device)


def train_text_encoder(
    tokenizer: Qwen2Tokenizer, settings: Settings, device: torch.device
) -> Qwen2_5_VLForConditionalGeneration:
    """Train a text encoder to name the attributes of captions.

    Args:
        tokenizer: The trained tokenizer.
        settings: The width and the number of steps.
        device: Where to train.

    Returns:
        The encoder in float32, its weights rounded to bfloat16: the embeddings trained on are those of the export.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng((settings.seed, 2))
    encoder = _build_text_encoder(tokenizer, settings).to(device)
    pipeline = text_pipeline(tokenizer, encoder)
    heads = nn.ModuleDict({name: nn.Linear(settings.text_width, len(words)) for name, words in _ATTRIBUTES.items()})
    parameters = [*encoder.model.language_model.parameters(), *heads.to(device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_MAX_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _MAX_LEARNING_RATE, total_steps=settings.text_steps)
    start = time.monotonic()
    for step in range(settings.text_steps):
        scenes = [random_scene(rng) for _ in range(_BATCH_SIZE)]
        embeddings, mask = pipeline.encode_prompt([random_caption(scene, rng) for scene in scenes], device=device)
        loss, accuracy = _attribute_loss(heads, embeddings, mask, scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == settings.text_steps - 1:
            seconds = time.monotonic() - start
            report = f"loss {loss.item():.4f} attributes right {accuracy:.3f} {seconds:.0f} s"
            print(f"text encoder step {step} {report}", flush=True)
    return encoder.eval().to(torch.bfloat16).float()


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    """Return the merges of a trained BPE tokenizer, in order."""
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


def _check_prefix(tokenizer: Qwen2Tokenizer) -> None:
    """Raise if the pipeline would drop more or fewer tokens than the template has before the prompt."""
    pipeline = text_pipeline(tokenizer)
    prefix = pipeline.prompt_template_encode.split("{}")[0]
    num_tokens, num_dropped = len(tokenizer(prefix).input_ids), pipeline.prompt_template_encode_start_idx
    if num_tokens != num_dropped:
        raise ValueError(f"the template's prefix has {num_tokens} tokens, but the pipeline drops {num_dropped}")


def _build_text_encoder(tokenizer: Qwen2Tokenizer, settings: Settings) -> Qwen2_5_VLForConditionalGeneration:
    """Make the untrained text encoder; its vision tower is as small as can be, for no picture is ever read."""
    width = settings.text_width
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": token_id("<|endoftext|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _attribute_loss(
    heads: nn.ModuleDict, embeddings: Tensor, mask: Tensor | None, scenes: list[Scene]
) -> tuple[Tensor, float]:
    """Return the summed cross entropy of all attributes at each of the last tokens, and the share that is right.

    Args:
        heads: A linear classifier per attribute.
        embeddings: (batch, length, width), padded at the end.
        mask: (batch, length), 1 for tokens; None if nothing is padded.
        scenes: What the captions say.
    """
    batch_size, length, width = embeddings.shape
    lengths = torch.full((batch_size,), length, device=embeddings.device) if mask is None else mask.sum(dim=1)
    last = lengths[:, None] - 1 - torch.arange(_NUM_LAST_TOKENS, device=embeddings.device)
    states = embeddings.gather(1, last[..., None].expand(-1, -1, width))
    losses, right = [], []
    for name, words in _ATTRIBUTES.items():
        labels = torch.tensor([words.index(getattr(scene, name)) for scene in scenes], device=embeddings.device)
        logits = heads[name](states).flatten(0, 1)
        labels = labels.repeat_interleave(_NUM_LAST_TOKENS)
        losses.append(F.cross_entropy(logits, labels))
        right.append((logits.argmax(dim=1) == labels).float().mean())
    return torch.stack(losses).sum(), torch.stack(right).mean().item()
