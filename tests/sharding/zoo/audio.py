"""Sound: LongCat-AudioDiT, Stable Audio 1 and 3, MiniMax Music 3, and the decoder of Spectrogram Diffusion."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _longcat(**changes: Any) -> Any:
    from diffusers import LongCatAudioDiTTransformer

    return LongCatAudioDiTTransformer(
        **{"dit_dim": 48, "dit_depth": 2, "dit_heads": 3, "dit_text_dim": 20, "latent_dim": 8, **changes}
    )


def _longcat_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 35, 8),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "encoder_attention_mask": key_mask((13, 5), 13),
        "timestep": torch.tensor([0.6, 0.25]),
        "attention_mask": key_mask((35, 35), 35),
        "latent_cond": draw(3, 2, 35, 8),
    }


def _longcat_lengths() -> Inputs:
    """Sounds of different lengths, and none to go on from."""
    return {**_longcat_inputs(), "attention_mask": key_mask((35, 9), 35), "latent_cond": None}


def build_stable_audio(global_states_input_dim: int = 28) -> Any:
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=35,
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_attention_heads=1,
        out_channels=8,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=global_states_input_dim,
        cross_attention_input_dim=20,
    )


def _stable_audio_inputs() -> Inputs:
    """One token of durations lies before the sound's."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return {
        "hidden_states": draw(1, 2, 8, 35),
        "timestep": torch.tensor([0.6]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "global_hidden_states": draw(3, 2, 1, 28),
        "rotary_embedding": get_1d_rotary_pos_embed(8, 36, use_real=True, repeat_interleave_real=False),
        "return_dict": False,
    }


def _stable_audio_masks() -> Inputs:
    return {
        **_stable_audio_inputs(),
        "attention_mask": key_mask((35, 9), 35),
        "encoder_attention_mask": key_mask((13, 5), 13),
    }


def _stable_audio_3(**changes: Any) -> Any:
    from diffusers import StableAudio3DiTModel

    config: dict[str, Any] = {
        "io_channels": 8,
        "patch_size": 1,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "cond_token_dim": 20,
        "global_cond_dim": 28,
        "local_add_cond_dim": 9,
        "timestep_features_dim": 16,
        "num_memory_tokens": 4,
    }
    return StableAudio3DiTModel(**{**config, **changes})


def _stable_audio_3_inputs() -> Inputs:
    """The last token of the text is the duration, which is never padding."""
    mask = key_mask((12, 5), 13)
    mask[:, -1] = True
    return {
        "hidden_states": draw(1, 2, 8, 35),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": draw(2, 2, 13, 20),
        "global_hidden_states": draw(3, 2, 28),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def _stable_audio_3_inpaint() -> Inputs:
    """What is kept, and a channel that says where."""
    kept = (torch.arange(35) < 16).float().expand(2, 1, 35)
    return {**_stable_audio_3_inputs(), "local_add_cond": torch.cat([1 - kept, draw(4, 2, 8, 35) * kept], dim=1)}


def _stable_audio_3_patches() -> Inputs:
    return {**_stable_audio_3_inputs(), "hidden_states": draw(1, 2, 8, 70)}


def _music_3() -> Any:
    from diffusers import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=20,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        ff_inner_dim=40,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )


def _music_3_inputs() -> Inputs:
    return {
        "hidden_states": draw(1, 2, 8, 35),
        "timestep": torch.tensor([0.6, 0.6]),
        "encoder_hidden_states": draw(2, 2, 35, 20),
        "return_dict": False,
    }


def _music_3_depth() -> Any:
    from diffusers import MiniMaxMusic3RVQDepthDecoder

    return MiniMaxMusic3RVQDepthDecoder(
        hidden_size=48,
        num_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        audio_vocab_size=11,
        num_codebooks=8,
        max_position_embeddings=16,
    )


def _music_3_depth_inputs() -> Inputs:
    """The hidden state of a frame and the codes drawn so far."""
    return {"inputs_embeds": draw(1, 2, 7, 48)}


def _music_3_first_code() -> Inputs:
    """Fewer tokens than ranks."""
    return {"inputs_embeds": draw(1, 2, 2, 48)}


def _t5_film() -> Any:
    from diffusers import T5FilmDecoder

    return T5FilmDecoder(
        input_dims=8,
        targets_length=35,
        max_decoder_noise_time=2000.0,
        d_model=48,
        num_layers=2,
        num_heads=3,
        d_kv=8,
        d_ff=40,
        dropout_rate=0.1,
    )


def _t5_film_inputs() -> Inputs:
    """Notes, and the sound before, which the first section of a song does not have."""
    before = torch.stack([torch.ones(9), torch.zeros(9)]).bool()
    return {
        "encodings_and_masks": [(draw(2, 2, 13, 48), key_mask((13, 5), 13)), (draw(3, 2, 9, 48), before)],
        "decoder_input_tokens": draw(1, 2, 35, 8),
        "decoder_noise_time": torch.tensor([0.6, 0.25]),
    }


ENTRIES = [
    Entry("LongCatAudioDiTTransformer", _longcat, _longcat_inputs),
    Entry(
        "LongCatAudioDiTTransformer",
        lambda: _longcat(adaln_type="local", long_skip=False, text_conv=False, cross_attn_norm=True),
        _longcat_lengths,
        variant="modulation in each block, lengths",
    ),
    Entry("StableAudioDiTModel", build_stable_audio, _stable_audio_inputs),
    Entry("StableAudioDiTModel", build_stable_audio, _stable_audio_masks, variant="masks"),
    Entry("StableAudio3DiTModel", _stable_audio_3, _stable_audio_3_inputs),
    Entry("StableAudio3DiTModel", _stable_audio_3, _stable_audio_3_inpaint, variant="inpaint"),
    Entry(
        "StableAudio3DiTModel",
        lambda: _stable_audio_3(patch_size=2, use_differential_attention=False, num_memory_tokens=0),
        _stable_audio_3_patches,
        variant="patches, plain attention",
    ),
    Entry("MiniMaxMusic3Transformer1DModel", _music_3, _music_3_inputs),
    Entry("MiniMaxMusic3RVQDepthDecoder", _music_3_depth, _music_3_depth_inputs),
    Entry("MiniMaxMusic3RVQDepthDecoder", _music_3_depth, _music_3_first_code, variant="first code"),
    Entry("T5FilmDecoder", _t5_film, _t5_film_inputs),
]
