"""Sound: Stable Audio and ACE-Step."""

from __future__ import annotations

from typing import Any

import torch

from omni_sp.testing.reference import randomise
from tests.pipelines.zoo.entry import PipelineEntry
from tests.sharding.zoo.ace_step import build_ace_step
from tests.sharding.zoo.audio import build_stable_audio
from tests.sharding.zoo.entry import draw, key_mask


def _oobleck(channels: int, sampling_rate: int) -> Any:
    """Four samples are one latent."""
    from diffusers import AutoencoderOobleck

    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * channels,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=sampling_rate,
    )
    return randomise(vae)


def _stable_audio() -> Any:
    from diffusers import EDMDPMSolverMultistepScheduler, StableAudioPipeline, StableAudioProjectionModel

    projection = StableAudioProjectionModel(text_encoder_dim=18, conditioning_dim=20, min_value=0, max_value=32)
    return StableAudioPipeline(
        vae=_oobleck(channels=8, sampling_rate=40),
        text_encoder=None,
        projection_model=randomise(projection),
        tokenizer=None,
        transformer=randomise(build_stable_audio(global_states_input_dim=40)),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3,
            sigma_max=500,
            solver_order=2,
            prediction_type="v_prediction",
            sigma_data=1.0,
            sigma_schedule="exponential",
        ),
    )


def _stable_audio_arguments() -> dict[str, Any]:
    """35 latents and a token of durations; two prompts of different length."""
    return {
        "prompt_embeds": draw(1, 2, 13, 18),
        "attention_mask": key_mask((13, 5), 13).long(),
        "negative_prompt_embeds": draw(2, 2, 13, 18),
        "negative_attention_mask": key_mask((4, 7), 13).long(),
        "guidance_scale": 7.0,
        "audio_start_in_s": 0.0,
        "audio_end_in_s": 3.1,
    }


class _Words:
    """Stands in for a tokenizer: one token a word."""

    def __call__(self, texts: list[str], max_length: int, **options: Any) -> Any:
        from transformers import BatchEncoding

        rows = [[1 + sum(map(ord, word)) % 60 for word in text.split()][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def _ace_step() -> Any:
    from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ace_step import AceStepConditionEncoder
    from transformers import Qwen3Config, Qwen3Model

    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
    )
    condition_encoder = AceStepConditionEncoder(
        hidden_size=28,
        intermediate_size=40,
        text_hidden_dim=24,
        timbre_hidden_dim=6,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=14,
        sliding_window=5,
    )
    # Checkpoints hold encoded silence here.
    condition_encoder.silence_latent = draw(3, 1, 80, 6)
    return AceStepPipeline(
        vae=_oobleck(channels=6, sampling_rate=4),
        text_encoder=randomise(text_encoder),
        tokenizer=_Words(),
        transformer=randomise(build_ace_step(in_channels=18)),
        condition_encoder=randomise(condition_encoder),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def _ace_step_arguments() -> dict[str, Any]:
    """69 latents make 35 tokens, the last of which is half empty; two songs with words of different length."""
    return {
        "prompt": ["slow piano", "a fast song with drums and two guitars"],
        "lyrics": ["[verse] one two three four", "la la"],
        "audio_duration": 69.0,
        "guidance_scale": 7.0,
    }


# The VAE's squared sines amplify: a call of the transformer is off by 2.5e-7, the last latents by 2.1e-6 and 5.6e-7.
ENTRIES = [
    PipelineEntry("StableAudioPipeline", _stable_audio, _stable_audio_arguments, error=5e-5),
    PipelineEntry("AceStepPipeline", _ace_step, _ace_step_arguments, error=5e-5),
]
