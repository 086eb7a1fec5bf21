"""The prior of unCLIP and Kandinsky, and Shap-E's."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask


def _prior() -> Any:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=3, attention_head_dim=16, num_layers=2, embedding_dim=20, num_embeddings=13
    )


def _prior_inputs() -> Inputs:
    """One embedding of an image; attention is causal, and looks at no padding of the text."""
    return {
        "hidden_states": draw(1, 2, 20),
        "timestep": torch.tensor(600),
        "proj_embedding": draw(2, 2, 20),
        "encoder_hidden_states": draw(3, 2, 13, 20),
        "attention_mask": key_mask((13, 5), 13),
    }


def _shap_e() -> Any:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=20,
        num_embeddings=35,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        embedding_proj_norm_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=40,
        embedding_proj_dim=12,
        clip_embed_dim=40,
    )


def _shap_e_inputs() -> Inputs:
    """A scene as 35 tokens, and several tokens of the image that it is made from."""
    return {"hidden_states": draw(1, 2, 35, 20), "timestep": torch.tensor(600), "proj_embedding": draw(2, 2, 9, 12)}


ENTRIES = [
    Entry("PriorTransformer", _prior, _prior_inputs),
    Entry("PriorTransformer", _shap_e, _shap_e_inputs, variant="Shap-E"),
]
