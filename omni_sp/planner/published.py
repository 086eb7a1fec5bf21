"""Transformers at the size that their makers published, as data: class, configuration, arguments.

Configurations are the defaults of the classes, and what the named model's ``config.json`` has instead. They are written
down by hand, not downloaded. That of Kandinsky 5 is the one that is least sure. What is different here on purpose is in
a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_sp.planner import inputs
from omni_sp.planner.inputs import Inputs, Size


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        transformer: its class in diffusers.
        size: of what it draws, and of the text, for people.
        heads: of its attention.
        inputs: makes the arguments of a forward at a size.
        config: what its configuration says that is not the class's default.
        note: what is not as published.
        depth: the entries of the configuration that say how many blocks it has.
        few: a model with so many blocks of each kind has all that are not like the others.
    """

    transformer: str
    size: str
    heads: int
    inputs: Callable[[Size], Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    depth: tuple[str, ...] = ("num_layers",)
    few: int = 2

    @property
    def published_size(self) -> Size:
        """``size`` as numbers."""
        found = re.match(r"(\d+) x (\d+)(?:, (\d+) frames)?", self.size)
        assert found is not None, self.size
        width, height, frames = (int(number or 1) for number in found.groups())
        return Size(height, width, frames)


PUBLISHED: dict[str, Published] = {
    "Qwen-Image": Published("QwenImageTransformer2DModel", "1328 x 1328, 128 text tokens", 24, inputs.qwen_image),
    "FLUX.1-dev": Published(
        "FluxTransformer2DModel",
        "1024 x 1024, 512 text tokens",
        24,
        inputs.flux,
        {"guidance_embeds": True},
        depth=("num_layers", "num_single_layers"),
    ),
    "FLUX.2-dev": Published(
        "Flux2Transformer2DModel",
        "1024 x 1024, 512 text tokens",
        48,
        inputs.flux2,
        depth=("num_layers", "num_single_layers"),
    ),
    "Chroma1-HD": Published(
        "ChromaTransformer2DModel",
        "1024 x 1024, 512 text tokens",
        24,
        inputs.chroma,
        depth=("num_layers", "num_single_layers"),
    ),
    "SD3.5-large": Published(
        "SD3Transformer2DModel",
        "1024 x 1024, 333 text tokens",
        38,
        inputs.sd3,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "SD3.5-medium": Published(
        "SD3Transformer2DModel",
        "1024 x 1024, 333 text tokens",
        24,
        inputs.sd3,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        few=14,
    ),
    "Z-Image": Published(
        "ZImageTransformer2DModel", "1024 x 1024, 128 text tokens", 30, inputs.z_image, depth=("n_layers",)
    ),
    "HiDream-I1": Published(
        "HiDreamImageTransformer2DModel",
        "1024 x 1024, 128 text tokens of each encoder",
        20,
        inputs.hidream,
        {
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": [4096, 4096],
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": [*range(32), *[31] * 16],
            "num_routed_experts": 0,
        },
        "a plain feed-forward layer in place of the experts, whose choice needs numbers",
        depth=(),
    ),
    "Wan2.2-T2V-A14B": Published("WanTransformer3DModel", "1280 x 720, 81 frames, 512 text tokens", 40, inputs.wan),
    "Wan2.2-I2V-A14B": Published(
        "WanTransformer3DModel",
        "1280 x 720, 81 frames, 512 text tokens",
        40,
        lambda size: inputs.wan(size, 36),
        {"in_channels": 36},
    ),
    "Wan2.2-TI2V-5B": Published(
        "WanTransformer3DModel",
        "1280 x 704, 121 frames, 512 text tokens",
        24,
        inputs.wan_5b,
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
    ),
    "Wan2.1-VACE-14B": Published(
        "WanVACETransformer3DModel",
        "1280 x 720, 81 frames, 512 text tokens",
        40,
        inputs.wan_vace,
        {"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35], "vace_in_channels": 96},
        depth=(),
    ),
    "SkyReels-V2-T2V-14B": Published(
        "SkyReelsV2Transformer3DModel",
        "960 x 544, 97 frames, 512 text tokens",
        40,
        inputs.skyreels,
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    ),
    "HunyuanVideo": Published(
        "HunyuanVideoTransformer3DModel",
        "1280 x 720, 129 frames, 256 text tokens",
        24,
        inputs.hunyuan_video,
        depth=("num_layers", "num_single_layers"),
    ),
    "HunyuanVideo-1.5": Published(
        "HunyuanVideo15Transformer3DModel",
        "848 x 480, 5 frames, 1985 tokens of text and image",
        16,
        inputs.hunyuan_video_15,
        note="fewer frames: the model makes a mask of all tokens by all tokens",
    ),
    "HunyuanImage-2.1": Published(
        "HunyuanImageTransformer2DModel",
        "2048 x 2048, 1128 text tokens",
        28,
        inputs.hunyuan_image,
        {"text_embed_2_dim": 1472},
        depth=("num_layers", "num_single_layers"),
    ),
    "LTX-Video-13B": Published(
        "LTXVideoTransformer3DModel",
        "1216 x 704, 121 frames, 256 text tokens",
        32,
        inputs.ltx,
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    ),
    "LTX-2": Published(
        "LTX2VideoTransformer3DModel", "768 x 512, 121 frames with sound, 1024 text tokens", 32, inputs.ltx2
    ),
    "CogVideoX-2b": Published(
        "CogVideoXTransformer3DModel", "720 x 480, 49 frames, 226 text tokens", 30, inputs.cogvideox
    ),
    "CogVideoX-5b": Published(
        "CogVideoXTransformer3DModel",
        "720 x 480, 49 frames, 226 text tokens",
        48,
        inputs.cogvideox_5b,
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "Mochi-1": Published("MochiTransformer3DModel", "848 x 480, 163 frames, 256 text tokens", 24, inputs.mochi),
    "Sana-1600M": Published("SanaTransformer2DModel", "1024 x 1024, 300 text tokens", 70, inputs.sana),
    "Sana-Video-2B": Published(
        "SanaVideoTransformer3DModel", "832 x 480, 81 frames, 300 text tokens", 20, inputs.sana_video
    ),
    "Cosmos-Predict2-2B": Published(
        "CosmosTransformer3DModel",
        "1280 x 704, 93 frames, 512 text tokens",
        16,
        inputs.cosmos,
        {
            "num_attention_heads": 16,
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        "without the channel of the padding mask",
    ),
    "Cosmos-1.0-7B": Published(
        "CosmosTransformer3DModel",
        "1280 x 704, 121 frames, 512 text tokens",
        32,
        inputs.cosmos_1,
        {"concat_padding_mask": False},
        "without the channel of the padding mask",
    ),
    "Kandinsky-5.0-T2V-Lite": Published(
        "Kandinsky5Transformer3DModel",
        "768 x 512, 121 frames, 256 text tokens",
        28,
        inputs.kandinsky_5,
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 1792,
            "ff_dim": 7168,
            "visual_cond": True,
        },
        depth=("num_visual_blocks",),
    ),
    "Lumina-Image-2.0": Published(
        "Lumina2Transformer2DModel", "1024 x 1024, 256 text tokens", 24, inputs.lumina_2, {"cap_feat_dim": 2304}
    ),
    "AuraFlow-v0.3": Published(
        "AuraFlowTransformer2DModel",
        "1024 x 1024, 256 text tokens",
        12,
        inputs.auraflow,
        depth=("num_mmdit_layers", "num_single_dit_layers"),
    ),
    "CogView4-6B": Published(
        "CogView4Transformer2DModel",
        "1024 x 1024, 224 text tokens",
        32,
        inputs.cogview_4,
        {"attention_head_dim": 128, "num_attention_heads": 32, "num_layers": 28},
    ),
    "PixArt-Sigma-XL": Published(
        "PixArtTransformer2DModel",
        "1024 x 1024, 300 text tokens",
        16,
        inputs.pixart,
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
}
"""By the name of the model."""
