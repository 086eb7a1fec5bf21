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
            ``tokens`` (stream name -> the most tokens that one forward had), ``dropped_tokens`` (tokenizer -> tokens of
            the prompt, or of the negative one, beyond the most that its text encoder reads; {} where nothing was
            dropped), ``ranks``, ``seed`` (a list where one was given; None where the pipeline takes no generator); of a
            video ``fps``, the frames to show in a second; of a sound ``sampling_rate``, in Hz.
        audios: one entry for each output, of a sound or of a video with sound: a float32 array of channels × samples
            between -1 and 1.
        settings: what it was drawn with, as the command line and the server keep it in the files of pictures: prompt,
            seed, size, steps, guidance, model, layout, version.
    """

    request_id: str
    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    audios: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def dropped_tokens_note(metrics: Mapping[str, Any]) -> str | None:
    """Say how many tokens of a prompt were dropped, by an output's metrics; None where all were read."""
    dropped = metrics.get("dropped_tokens")
    if not dropped:
        return None
    counts = ", ".join(f"{name} dropped {count} token{'s' * (count > 1)}" for name, count in dropped.items())
    return f"the prompt is longer than the model reads: {counts} at its end"


@dataclass(frozen=True)
class CheckReport:
    """How exact a model is over several ranks.

    Attributes:
        errors: stage -> the largest relative difference from one process, see `Omni.check`.
        gathers: operation of a model's code -> how often it needed the full tensor of one that is sharded.
        blocks: how the calls of blocks were made: "replayed", "recorded" and "compiled" -> how many, "followed" ->
            reason -> how many; see `omni_sp.sharding.BlockCounts`.
    """

    errors: Mapping[str, float]
    gathers: Mapping[str, int]
    blocks: Mapping[str, Any]
