"""The transformer stage: rectified flow on the pool's latents, given the prompt embeddings.

The first part of the training sees a random half of each picture's tokens.  That is faster, and a model that sees less
of the picture must rely more on the prompt; the rest sees whole pictures, as the pipeline will.

Letters in tensor names: P scenes in the pool, B batch, T picture tokens, L text tokens, C channels.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from training.shapes.muon import Muon
from training.shapes.pool import TOKENS_PER_SIDE, Pool
from training.shapes.settings import Settings

__all__ = ["build_transformer", "train_transformer"]

_MUON_LEARNING_RATE = 2e-3
_ADAMW_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.01
_MAX_EMA_DECAY = 0.998
# The share of prompts replaced by the empty one, for classifier-free guidance.
_EMPTY_PROMPTS = 0.1
_CHECKPOINT_EVERY = 250


def build_transformer(settings: Settings) -> QwenImageTransformer2DModel:
    """Make the untrained transformer.

    Every block begins as a small correction and the output as zero; the model class leaves that to its loader.
    """
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * settings.latent_channels,
        out_channels=settings.latent_channels,
        num_layers=settings.num_layers,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.num_heads,
        joint_attention_dim=settings.text_width,
        axes_dims_rope=(4, 14, 14),
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            # Shift, scale and gate of the attention, then of the MLP: open the gates.
            modulation.bias.data.unflatten(0, (2, 3, -1))[:, 2] = 1.0 / math.sqrt(2 * settings.num_layers)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def train_transformer(
    pool: Pool, settings: Settings, parts: Path, device: torch.device, *, on_checkpoint: Callable[[], None]
) -> None:
    """Train the transformer, from the last checkpoint if there is one.

    Args:
        pool: The encoded scenes, on `device`.
        settings: Sizes, steps and the seed.
        parts: Where transformer.pt, the checkpoint, and transformer/, the averaged model, are written.
        device: Where to train.
        on_checkpoint: Called after these have been written.
    """
    torch.manual_seed(settings.seed)
    transformer = build_transformer(settings).to(device)
    average = build_transformer(settings).to(device).requires_grad_(False)
    average.load_state_dict(transformer.state_dict())
    optimizers = _optimizers(transformer)
    first_step = _resume(parts / "transformer.pt", transformer, average, optimizers, device)
    transformer.compile_repeated_blocks(dynamic=False)
    start = time.monotonic()
    losses: list[Tensor] = []
    for step in range(first_step, settings.transformer_steps):
        # Each step has its own random stream, so a resumed run draws what an uninterrupted one would.
        generator = torch.Generator(device).manual_seed(settings.seed + 1_000_003 * (step + 1))
        num_tokens = pool.tokens_PTC.shape[1]
        num_kept = num_tokens // 2 if step < settings.half_steps else num_tokens
        kept_T = torch.randperm(num_tokens, generator=generator, device=device)[:num_kept]
        with _positions(transformer, kept_T):
            loss = _loss(transformer, pool, kept_T, settings, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        factor = _learning_rate_factor(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _update_average(average, transformer, decay=min(_MAX_EMA_DECAY, (1 + step) / (10 + step)))
        losses.append(loss.detach())
        if (step + 1) % 50 == 0:
            seconds, mean_loss = time.monotonic() - start, torch.stack(losses).mean().item()
            print(f"transformer step {step + 1} loss {mean_loss:.4f} {seconds:.0f} s", flush=True)
            losses.clear()
        if (step + 1) % _CHECKPOINT_EVERY == 0 or step + 1 == settings.transformer_steps:
            _save(parts, step + 1, transformer, average, optimizers)
            on_checkpoint()


def _loss(
    transformer: QwenImageTransformer2DModel, pool: Pool, kept_T: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Return the weighted mean squared error of the velocity for a random batch, at the picture tokens kept."""
    device, batch_size = pool.tokens_PTC.device, settings.batch_size
    index = torch.randint(len(pool.tokens_PTC), (batch_size,), generator=generator, device=device)
    clean_BTC, weights_BT = pool.tokens_PTC[index][:, kept_T], pool.weights_PT[index][:, kept_T]
    empty_B = torch.rand(batch_size, generator=generator, device=device) < _EMPTY_PROMPTS
    text_BLC = torch.where(empty_B[:, None, None], pool.empty_text_LC, pool.text_PLC[index])
    mask_BL = torch.where(empty_B[:, None], pool.empty_text_mask_L, pool.text_mask_PL[index])
    # One noise level from each of batch_size equal parts of 0 to 1, which makes the gradient steadier.
    uniform_B = torch.rand(batch_size, generator=generator, device=device) + torch.arange(batch_size, device=device)
    uniform_B = uniform_B / batch_size
    sigma_B = settings.shift * uniform_B / (1 + (settings.shift - 1) * uniform_B)
    noise_BTC = torch.randn(clean_BTC.shape, generator=generator, device=device)
    sigma_B11 = sigma_B[:, None, None]
    velocity_BTC = transformer(
        hidden_states=(1 - sigma_B11) * clean_BTC + sigma_B11 * noise_BTC,
        encoder_hidden_states=text_BLC,
        encoder_hidden_states_mask=mask_BL,
        timestep=sigma_B,
        img_shapes=[[(1, TOKENS_PER_SIDE, TOKENS_PER_SIDE)]] * batch_size,
        return_dict=False,
    )[0]
    error_BT = (velocity_BTC - (noise_BTC - clean_BTC)).square().mean(dim=2)
    loss: Tensor = (weights_BT * error_BT).sum() / weights_BT.sum()
    return loss


@contextmanager
def _positions(transformer: QwenImageTransformer2DModel, kept_T: Tensor) -> Iterator[None]:
    """Give the picture tokens kept their own rotary positions, instead of those of the first tokens."""

    def select(_: nn.Module, __: Any, frequencies: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        picture_frequencies, text_frequencies = frequencies
        return picture_frequencies[kept_T], text_frequencies

    hook = transformer.pos_embed.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _optimizers(transformer: QwenImageTransformer2DModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of attention and picture MLPs and AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        is_matrix = parameter.ndim == 2 and (".attn." in name or ".img_mlp." in name)
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon([{"params": matrices, "initial_lr": _MUON_LEARNING_RATE}], weight_decay=_WEIGHT_DECAY),
        torch.optim.AdamW(
            [{"params": others, "initial_lr": _ADAMW_LEARNING_RATE}], betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY
        ),
    ]


def _learning_rate_factor(step: int, settings: Settings) -> float:
    """Return what to multiply the learning rates with: a ramp up, a plateau, a ramp down to nothing."""
    ramp_up = (step + 1) / settings.warmup_steps
    ramp_down = (settings.transformer_steps - step) / settings.decay_steps
    return min(1.0, ramp_up, ramp_down)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Move the averaged weights towards the model's."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _resume(
    path: Path,
    transformer: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
) -> int:
    """Load a checkpoint, if there is one, and return the first step to do."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, map_location=device)
    transformer.load_state_dict(checkpoint["transformer"])
    average.load_state_dict(checkpoint["average"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    print(f"transformer: continuing from step {checkpoint['step']}", flush=True)
    return int(checkpoint["step"])


def _save(
    parts: Path,
    step: int,
    transformer: nn.Module,
    average: QwenImageTransformer2DModel,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Write the checkpoint, and the averaged model as the export will take it."""
    checkpoint = {
        "step": step,
        "transformer": transformer.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(checkpoint, parts / "transformer.pt.new")
    (parts / "transformer.pt.new").rename(parts / "transformer.pt")
    average.save_pretrained(parts / "transformer")
