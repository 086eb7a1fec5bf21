"""What comes back for a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass
class OmniRequestOutput:
    """The pictures, videos or sounds of one prompt, and what they took.

    Attributes:
        request_id: unique within its Omni.
        prompt: the text it was made from.
        images: PIL pictures, one for each output asked for (layers of one picture follow each other); for other
            ``output_type``s, what the pipeline gave.
        videos: one entry for each output: its frames, a list of PIL pictures.
        metrics: seconds (``startup_s`` until ready, in ``startup_parts_s`` by part; ``load_s`` to load the model;
            ``text_encoder_s``, ``denoise_s``, ``denoise_step_s`` on average, ``vae_s``, ``total_s``), ``num_steps``,
            ``tokens`` (stream name -> the most tokens that one forward had), ``ranks``, ``seed`` (None where the
            pipeline takes no generator); of a video ``fps``, the frames to show in a second; of a sound
            ``sampling_rate``, in Hz.
        audios: one entry for each output, of a sound or of a video with sound: a float32 array of channels × samples
            between -1 and 1.
    """

    request_id: str
    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    audios: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class CheckReport:
    """How exact a model is over several ranks.

    Attributes:
        errors: stage -> the largest relative difference from one process, see `Omni.check`.
        gathers: operation of a model's code -> how often it needed the full tensor of one that is sharded.
    """

    errors: Mapping[str, float]
    gathers: Mapping[str, int]
