"""What one picture or video costs, from the configuration of its model alone."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.errors import ConfigError
from omni_sp.planner.counting import Operations, fake_forward, of_all_blocks
from omni_sp.planner.folders import HEADS, PipelineFolder, read_folder
from omni_sp.planner.inputs import Size
from omni_sp.planner.published import PUBLISHED, Published
from omni_sp.validation import require_int, suggestion

MODELS_FILE = Path(__file__).with_name("models.json")

_MOST_PIXELS = 300_000_000
"""Of every fourth frame together: more than any model draws. Positions of tokens are real numbers, and take memory."""
_FEW_TOKENS = ("norm", "mod", "time", "ada", "add_", "context", "txt", "text")
"""Words in the paths of layers that see one token, or those of a text."""


@dataclass(frozen=True)
class ModelCost:
    """The cost of one result on one device, in parts.

    Attributes:
        name: of the model.
        size: of the result.
        tokens: of the sequence that ranks share, picture and text.
        heads: of its attention.
        head_dim: channels of one head.
        blocks: calls of attention over this sequence in one forward.
        linear_flops: of one forward, without this attention.
        whole_flops: of these, what every rank computes: layers that see no token of this sequence, such as those of a
            text that is attended to from it.
        attention_flops: of this attention in one forward.
        parameters: of one transformer.
        transformers: of the pipeline, of which one runs at a time.
        block_elements: elements that the layers of one block make.
        branches: forwards of one step, for guidance.
        steps: of denoising.
        encoder_parameters: of the text encoders.
        text_tokens: that they read.
        vae_flops: of decoding.
        vae_parameters: of the autoencoder.
        vae_elements: elements of the largest activation that decoding holds.
        is_estimate: FLOPs are from the sizes of the weights, not counted on the model's own code.
    """

    name: str
    size: Size
    tokens: int
    heads: int
    head_dim: int
    blocks: int
    linear_flops: float
    attention_flops: float
    parameters: float
    transformers: int = 1
    whole_flops: float = 0.0
    block_elements: float = 0.0
    branches: int = 1
    steps: int = 50
    encoder_parameters: float = 0.0
    text_tokens: int = 512
    vae_flops: float = 0.0
    vae_parameters: float = 0.0
    vae_elements: float = 0.0
    is_estimate: bool = False

    @property
    def forwards(self) -> int:
        """Forwards of the transformer for one result."""
        return self.steps * self.branches

    @property
    def flops(self) -> float:
        """Of one forward."""
        return self.linear_flops + self.attention_flops


def model_cost(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    branches: int | None = None,
) -> ModelCost:
    """Count what a model costs.

    Args:
        model: the name of a model that ships with the planner ("Qwen/Qwen-Image", "FLUX.1-dev", "Wan2.2"), a folder, or
            a repository in the hub's cache: of these, configurations and the heads of files of weights are read.
        height: of the result in pixels; None for the published one, or 1024.
        width: the same.
        num_frames: of a video; None for the published number.
        steps: of denoising; None for the pipeline's default.
        branches: forwards of one step: 2 with guidance by a negative prompt; None for the pipeline's default.

    Raises:
        ConfigError: the model is not known, or its size does not suit it.
    """
    given = {"height": height, "width": width, "num_frames": num_frames}
    changes = {name.removeprefix("num_"): value for name, value in given.items() if value is not None}
    for what, value in {**given, "steps": steps, "branches": branches}.items():
        if value is not None:
            require_int(what, value, minimum=1, error=ConfigError, hint="give a whole number of at least 1")
    name, published, folder = _find(model)
    size = replace(published[1].published_size if published else Size(1024, 1024), **changes)
    if size.height * size.width * size.latent(1)[0] > _MOST_PIXELS:
        raise ConfigError(
            f"{size} is too large to be counted: give at most {_MOST_PIXELS} pixels in every fourth frame"
        )
    if published is None:
        cost = _estimated(name, folder, size)
    else:
        try:
            with _quiet_fake_tensors():
                cost = _counted(name, published[1], size)
        except ConfigError:
            raise
        except Exception as error:  # of the model's own code
            if folder is None:
                raise ConfigError(f"{name} does not run at {size}: {_in_one_line(error)}") from error
            cost = _estimated(name, folder, size)
    cost = _with_pipeline(cost, _pipelines().get(published[0], {}) if published else {}, folder)
    return replace(
        cost,
        steps=cost.steps if steps is None else steps,
        branches=cost.branches if branches is None else branches,
    )


@cache
def _pipelines() -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = json.loads(MODELS_FILE.read_text())
    return data


def _find(model: str) -> tuple[str, tuple[str, Published] | None, PipelineFolder | None]:
    """A model's name, the published model that describes it, by name, and its folder where there is one."""
    folder = read_folder(model)
    if folder is not None:
        values = {key: value for key, value in folder.transformer.items() if not key.startswith("_")}
        for name, published in PUBLISHED.items():
            if published.transformer == folder.transformer.get("_class_name") and not published.note:
                return model, (name, replace(published, config=values)), folder
        return model, None, folder
    wanted = model.rstrip("/").split("/")[-1].lower().removesuffix("-diffusers")
    for name in PUBLISHED:
        if name.lower().startswith(wanted) and wanted:
            return name, (name, PUBLISHED[name]), None
    otherwise = "it is no folder, not in the cache of the hub, and none of {known}"
    raise ConfigError(f"nothing is known of {model!r}: {suggestion(model, PUBLISHED, otherwise)}")


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from logging the traceback of a forward whose arguments do not fit: it is estimated then."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _too_small(name: str, size: Size) -> ConfigError:
    return ConfigError(f"{name} has no token at {size}: give a larger height and width")


def _counted(name: str, published: Published, size: Size) -> ModelCost:
    """Run the model's own code on fake tensors."""
    tensors = [x for x in tree_flatten(published.inputs(size))[0] if isinstance(x, torch.Tensor)]
    if not all(x.numel() for x in tensors):
        raise _too_small(name, size)

    def count(**changes: Any) -> tuple[Counter[Any], ...]:
        with fake_forward(published, size, **changes) as (model, inputs):
            operations = Operations(model)
            with operations.counting():
                model(**inputs)
            sums = {
                "flops": operations.flops.total(),
                "elements": operations.elements,
                "parameters": sum(weight.numel() for weight in model.parameters()),
            }
            return Counter(sums), operations.attentions, operations.rows

    sums, attentions, rows = of_all_blocks(published, count)
    own = {shape: calls for shape, calls in attentions.items() if shape[0] == shape[1]}
    if own:
        tokens, _, heads, head_dim = max(own)
        blocks = sum(calls for shape, calls in own.items() if shape[0] * 2 > tokens)
        attention = sum(4 * q * k * h * d * calls for (q, k, h, d), calls in own.items() if q * 2 > tokens)
    else:  # linear attention, which exchanges little
        tokens, heads, head_dim, blocks, attention = 1, published.heads, 1, 0, 0
        rows = Counter()
    parameters = float(sums["parameters"])
    # Tokens of other attentions to themselves, as of a text before it joins, are shared too.
    streams = {length for length, *_ in own} | {length for length in rows if tokens - length in rows}
    return ModelCost(
        name, size, tokens, heads, head_dim, blocks, float(sums["flops"] - attention), float(attention), parameters,
        whole_flops=float(sum(flops for length, flops in rows.items() if length not in streams)),
        block_elements=sums["elements"] / max(blocks, 1),
    )  # fmt: skip


def _with_pipeline(cost: ModelCost, entry: Mapping[str, Any], folder: PipelineFolder | None) -> ModelCost:
    """Add encoder, autoencoder and the pipeline's defaults: what the folder says, else what is known by the name."""
    folder = folder or PipelineFolder({})
    vaes = _pipelines()["_vaes"]
    vae = vaes.get(folder.vae) or vaes.get(entry.get("vae", "")) or vaes["AutoencoderKL"]
    vae_parameters = folder.vae_parameters or vae["gparams"] * 1e9
    size = cost.size
    pixels = size.height * size.width
    per_pixel = vae["mflop_per_pixel"] + vae.get("mflop_per_later_pixel", vae["mflop_per_pixel"]) * (size.frames - 1)
    latent_frames = size.latent(8)[0]
    flops = pixels * per_pixel * 1e6 + latent_frames * 4 * vae.get("attention_channels", 0) * (pixels / 64) ** 2
    return replace(
        cost,
        transformers=max(entry.get("transformers", 1), folder.transformers),
        branches=folder.branches or entry.get("branches", 1),
        steps=folder.steps or entry.get("steps", 50),
        encoder_parameters=folder.encoder_parameters or entry.get("encoder_gparams", 0.0) * 1e9,
        vae_flops=flops * vae_parameters / (vae["gparams"] * 1e9),  # a smaller one of the class has narrower layers
        vae_parameters=vae_parameters,
        vae_elements=pixels * min(size.frames, 4) * 128.0 * 3,
    )


def _estimated(name: str, folder: PipelineFolder | None, size: Size) -> ModelCost:
    """From the sizes of the weights; ConfigError where the folder's configuration is no model's."""
    try:
        return _from_weights(name, folder.transformer if folder else {}, size)
    except ConfigError:
        raise
    except Exception as error:  # of the class, which may look at any entry
        raise ConfigError(
            f"{name}: no model can be made of its transformer/config.json: {_in_one_line(error)}"
        ) from error


def _from_weights(name: str, config: Mapping[str, Any], size: Size) -> ModelCost:
    """FLOPs of a class whose arguments nobody described, from the sizes of its blocks' linear layers."""
    import diffusers

    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_model = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    if not is_model:
        raise ConfigError(f"{name}: the installed diffusers has no class {config.get('_class_name')}")
    with torch.device("meta"):
        model = kind.from_config(dict(config))
    config = model.config  # with the defaults of the class
    heads = int(_first(config, *HEADS) or 1)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    lists = [one for one in lists if any(hasattr(block, "attn") or "Block" in type(block).__name__ for block in one)]
    blocks = sum(len(one) for one in lists)
    if not blocks:
        raise ConfigError(f"{name}: no blocks were found in {kind.__name__}, and its arguments are not known")
    weights = sum(
        module.weight.numel()
        for one in lists
        for path, module in one.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(word in path for word in _FEW_TOKENS)
    )
    width = heads * int(_first(config, "attention_head_dim", "head_dim") or 128)
    patch = config.get("patch_size", 2)
    frame_patch, side = (patch[0], patch[-1]) if isinstance(patch, (list, tuple)) else (1, patch)
    frames, height, width_latent = size.latent(8 if side > 1 else 16)
    tokens = math.ceil(frames / frame_patch) * (height // side) * (width_latent // side)
    if not tokens:
        raise _too_small(name, size)
    return ModelCost(
        name, size, tokens, heads, width // heads, blocks,
        2.0 * weights * tokens, 4.0 * blocks * width * tokens**2,
        float(sum(weight.numel() for weight in model.parameters())),
        block_elements=10.0 * tokens * width, is_estimate=True,
    )  # fmt: skip


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name)), None)
