"""What is known of pipelines by the name of a class, an argument or an attribute. Data only; no other file names them.

Where an entry is part of a class's name, it holds for every class whose name contains it.
"""

from __future__ import annotations

import re

ARGUMENT_NAMES: dict[str, tuple[str, ...]] = {
    "num_outputs_per_prompt": ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
    "fps": ("fps", "frame_rate"),
    "num_frames": ("num_frames", "frames", "video_length"),
    "image": ("image", "images", "input_images", "cond_image"),
}
"""Our name of an argument -> the names that pipelines have for it, in order of preference."""

PROMPT_TENSORS = re.compile(r".*_embeds.*|.*_mask(_\d)?|(.*_)?latents")
"""Names of arguments that hold a prompt, or the noise to start from, as tensors."""

EMBEDDINGS = "_embeds"
"""Part of the names of those of them that are in the dtype of the model."""

IMAGE_FIELDS, VIDEO_FIELDS, SOUND_FIELDS = ("images", "image"), ("frames", "video"), ("audios", "audio", "sound")
"""Fields of a pipeline's output, in order of preference."""

SINGLE_SOUND_FIELD = "sound"
"""A field that holds the sound of one video, where others hold one for each output."""

VIDEO_ARGUMENTS, SOUND_ARGUMENTS = ("num_frames", "num_videos_per_prompt"), ("num_waveforms_per_prompt",)
"""Arguments of a pipeline that makes videos or sounds, for one that declares no output class."""

# Images that a pipeline starts from

NEEDS_IMAGE = (
    "BriaFiboEdit", "Fill", "ImageToVideo", "Image2Video", "Img2Img", "Inpaint", "LongCatImageEdit", "QwenImageEdit",
    "QwenImageLayered", "Refiner", "VideoToWorld",
)  # fmt: skip
"""Parts of the names of classes that give ``image`` a default, and fail without it."""

TAKES_ONE_IMAGE = (
    "Fill", "I2I", "Img2Img", "Inpaint", "Kontext", "LongCatImageEdit", "QwenImageEditPipeline", "QwenImageLayered",
    "Refiner",
)  # fmt: skip
"""Parts of the names of classes to which a list is a batch, one image a prompt; to others, several references."""

SINGLE_IMAGE_ARGUMENTS = ("image", "cond_image")
"""Names of the image argument that may mean one image."""

IMAGE_LIST_ARGUMENTS = ("images", "input_images")
"""Arguments that take a list of images, also where there is only one."""

SEVERAL_CONDITIONS = "conditions"
"""An argument of video pipelines that start from several images or videos."""

REPLACES_IMAGE = ("image", "video", "latents", "conditions")
"""Words in the names of arguments that a pipeline may start from instead of its image."""

MASK = "mask"
"""Part of the names of arguments whose images say where, and not what: pipelines take them in grey."""

PLACEHOLDER_IMAGES = {"mask_image": ("L", "white"), "control_image": ("RGB", "grey")}
"""Arguments without which a pipeline fails, with the mode and the colour of an image that will do."""

# Sizes

AREA = "max_area"
"""The argument of pipelines that draw this many pixels, and take from height and width only their ratio."""

SMALL_VALUES: dict[str, float | bool] = {
    "audio_end_in_s": 1.0,
    "audio_length_in_s": 1.0,
    "audio_duration": 1.0,
    "audio_duration_s": 1.0,
    "duration": 1.0,
    "_auto_resize": False,
}
"""Arguments that decide how large a result is, beside those that we name, with values that make it small."""

SPATIAL_FACTORS = (
    "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor",
)  # fmt: skip
TEMPORAL_FACTORS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Attributes of pipelines: pixels along a side, and frames, that the VAE makes one latent of."""

SAMPLING_RATES = (
    ("vocoder", "output_sampling_rate"), ("vocoder", "sampling_rate"),
    ("", "audio_sample_rate"), ("", "sample_rate"),
    ("vae", "sampling_rate"), ("vae", "sample_rate"),
    ("sound_tokenizer", "sampling_rate"), ("sound_tokenizer", "sample_rate"),
    ("audio_vae", "sampling_rate"), ("audio_vae", "sample_rate"),
)  # fmt: skip
"""Where the samples a second of a sound stand, the first that holds: component and entry of its config; "" for an
attribute of the pipeline itself."""

# Prompts

TEMPLATE_PREFIX = "prompt_template_encode_start_idx"
"""An attribute of pipelines: tokens of their template that they drop from the beginning of the embeddings."""

ENCODERS = r"text_encoder(_\d+)?|image_encoder|vision_language_encoder|prompt_enhancer|siglip|pe"
"""Names of components that make embeddings of prompts and of pictures to start from; none of them looks at results."""

# Decoding

DECODERS = ("vae", "audio_vae", "vocoder")
"""Components that turn latents into results."""

ENCODED_ARGUMENTS = ("image", "images", "video", "audio", "waveforms", "conditions")
"""Last words of the names of arguments that a decoder's component would encode."""

NOT_ENCODED = "ip_adapter"
"""Part of the names of arguments that end in such a word, and are encoded by another component."""

NO_LATENT_OUTPUT = ("QwenImageLayeredPipeline",)
"""Classes whose own branch for ``output_type="latent"`` fails after all the denoising (diffusers 0.42.1)."""

# Schedulers

FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)  # fmt: skip
"""Schedulers that step along a flow, for a hint; diffusers says of none that they are compatible."""

SHIFTS = ("shift", "flow_shift")
"""Names that schedulers have for the shift of a flow's steps."""

OPTIONAL_PACKAGES = {"ftfy": "ftfy", "BeautifulSoup": "beautifulsoup4"}
"""Names that diffusers imports only where they are installed, and pipelines use unchecked -> the package."""
