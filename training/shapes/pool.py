"""The pool: scenes drawn and encoded once, so that neither encoder runs while the transformer trains.

Letters in tensor names: P scenes in the pool, B batch, T picture tokens, L text tokens, C channels.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from training.shapes.autoencoder import encode_pictures, load_autoencoder
from training.shapes.settings import Settings
from training.shapes.text import load_text_encoder, load_tokenizer, random_caption, text_pipeline
from training.shapes.world import COLOURS, PICTURE_SIZE, SHAPES, Scene, coverage, random_scene

__all__ = ["TOKENS_PER_SIDE", "Pool", "is_held_out", "load_pool"]

# A token is 2 x 2 latents, and a latent is 8 x 8 pixels.
TOKENS_PER_SIDE = PICTURE_SIZE // 16
# Length to which prompt embeddings are padded; the longest caption has 19 tokens.
_NUM_TEXT_TOKENS = 20
_EDGE_WEIGHT = 4.0
_INSIDE_WEIGHT = 1.0
_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Encoded scenes.

    Args:
        tokens_PTC: Latents, packed to tokens.
        weights_PT: How much each token counts in the loss, 1 for plain background.
        text_PLC: Prompt embeddings.
        text_mask_PL: 1 for tokens, 0 for padding.
        empty_text_LC: Embedding of the empty prompt, " ", which stands for no prompt.
        empty_text_mask_L: Its mask.
    """

    tokens_PTC: Tensor
    weights_PT: Tensor
    text_PLC: Tensor
    text_mask_PL: Tensor
    empty_text_LC: Tensor
    empty_text_mask_L: Tensor


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's shape and colours are one of the combinations never trained on, an eighth of all."""
    colours = list(COLOURS)
    number = SHAPES.index(scene.shape) + 3 * colours.index(scene.colour) + 5 * colours.index(scene.background)
    return number % 8 == 0


def load_pool(parts: Path, settings: Settings, device: torch.device) -> Pool:
    """Return the pool of the trained encoders, made and kept in `parts` / pool.pt if it is not there yet.

    Args:
        parts: Folder with the trained tokenizer/, text_encoder/ and vae/.
        settings: The pool's size and the seed.
        device: Where to encode, and where the pool will lie.
    """
    path = parts / "pool.pt"
    if not path.exists():
        torch.save(vars(_make_pool(parts, settings, device)), path)
    return Pool(**torch.load(path, map_location=device))


def _make_pool(parts: Path, settings: Settings, device: torch.device) -> Pool:
    rng = np.random.default_rng((settings.seed, 3))
    scenes: list[Scene] = []
    while len(scenes) < settings.pool_size:
        scene = random_scene(rng)
        if not is_held_out(scene):
            scenes.append(scene)
    autoencoder = load_autoencoder(parts / "vae", device)
    text = text_pipeline(load_tokenizer(parts / "tokenizer"), load_text_encoder(parts / "text_encoder", device))
    start = time.monotonic()
    latents, texts, masks = [], [], []
    for first in range(0, len(scenes), _BATCH_SIZE):
        batch = scenes[first : first + _BATCH_SIZE]
        pictures = torch.from_numpy(np.stack([np.asarray(scene.draw()) for scene in batch])).permute(0, 3, 1, 2)
        latents.append(encode_pictures(autoencoder, pictures))
        text_BLC, mask_BL = _embed(text, [random_caption(scene, rng) for scene in batch], device)
        texts.append(text_BLC)
        masks.append(mask_BL)
        if first % (16 * _BATCH_SIZE) == 0:
            print(f"pool {first} of {len(scenes)} scenes {time.monotonic() - start:.0f} s", flush=True)
    latents_PCHW = torch.cat(latents)
    tokens_PTC = QwenImagePipeline._pack_latents(latents_PCHW, *latents_PCHW.shape)
    empty_text_BLC, empty_mask_BL = _embed(text, [" "], device)
    return Pool(
        tokens_PTC=tokens_PTC.contiguous(),
        weights_PT=torch.stack([_weights(scene) for scene in scenes]),
        text_PLC=torch.cat(texts),
        text_mask_PL=torch.cat(masks),
        empty_text_LC=empty_text_BLC[0],
        empty_text_mask_L=empty_mask_BL[0],
    )


@torch.no_grad()
def _embed(text: QwenImagePipeline, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embed prompts as the pipeline does, and pad them to `_NUM_TEXT_TOKENS`."""
    embeddings_BLC, mask_BL = text.encode_prompt(captions, device=device)
    if mask_BL is None:  # all of the same length
        mask_BL = torch.ones(embeddings_BLC.shape[:2], dtype=torch.long, device=device)
    num_missing = _NUM_TEXT_TOKENS - embeddings_BLC.shape[1]
    if num_missing < 0:
        raise ValueError(f"a caption has {embeddings_BLC.shape[1]} tokens, more than {_NUM_TEXT_TOKENS}")
    return (
        torch.nn.functional.pad(embeddings_BLC, (0, 0, 0, num_missing)),
        torch.nn.functional.pad(mask_BL, (0, num_missing)).bool(),
    )


def _weights(scene: Scene) -> Tensor:
    """Return what each token counts in the loss, (T,): the edge decides the shape but is a small part of a picture."""
    inside = coverage(scene.outline(), PICTURE_SIZE).reshape(TOKENS_PER_SIDE, 16, TOKENS_PER_SIDE, 16).mean(axis=(1, 3))
    edge = (inside > 0) & (inside < 1)
    return (
        torch.from_numpy(1 + _INSIDE_WEIGHT * (inside > 0) + (_EDGE_WEIGHT - _INSIDE_WEIGHT) * edge).float().flatten()
    )
