"""RFD4-Proteina: residues of a protein, and what is known of each pair of them."""

from __future__ import annotations

from typing import Any

import torch

from tests.sharding.zoo.entry import Entry, Inputs, draw, key_mask

_TOKENS = 19


def _build() -> Any:
    from diffusers import RFD4ProteinaTransformer

    return RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=48,
        nheads=3,
        dim_cond=24,
        pair_repr_dim=20,
        latent_dim=8,
        token_type_emb_dim=8,
        cath_emb_dim=8,
        t_emb_dim=16,
        seq_sep_dim=8,
        xt_pair_dist_dim=6,
        update_pair_repr_every_n=1,
        tri_mult_c=12,
        num_sequence_classes=11,
        recycle_conditioning_dim=3,
    )


def _whole_numbers(seed: int, below: int, *shape: int) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def _inputs() -> Inputs:
    """Two chains, of which the second sample has fewer residues; part of the structure is given."""
    mask = key_mask((_TOKENS, 11), _TOKENS)
    atoms = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord", "hotspot", "rasa-binned")
    interactions = {
        f"condition_{name}_1_atom": _whole_numbers(20 + i, 4, 2, _TOKENS, 37) for i, name in enumerate(atoms)
    }
    chains = (torch.arange(_TOKENS) >= 7).long().expand(2, _TOKENS)
    bonds = _whole_numbers(12, 2, 2, _TOKENS, _TOKENS)
    return {
        "bb_ca": draw(1, 2, _TOKENS, 3),
        "local_latents": draw(2, 2, _TOKENS, 8),
        "bb_ca_time": torch.tensor([0.6, 0.6]),
        "local_latents_time": torch.tensor([0.4, 0.4]),
        "padding_mask": mask,
        "token_type": _whole_numbers(3, 7, 2, _TOKENS),
        "atom37_mask": _whole_numbers(4, 2, 2, _TOKENS, 37).bool(),
        "conditioning": {
            **interactions,
            "is_in_context_conditioning": key_mask((3, 2), _TOKENS),
            "supports_local_latent": _whole_numbers(5, 2, 2, _TOKENS).bool(),
            "condition_coordinate_1_atom": draw(6, 2, _TOKENS, 37, 3),
            "condition_secondary-structure_1_residue": _whole_numbers(7, 4, 2, _TOKENS),
            "condition_index-group_1_token": _whole_numbers(8, 3, 2, _TOKENS),
            "condition_cath-label_1_residue": _whole_numbers(9, 5, 2, _TOKENS, 3),
            "molecule_iid": chains,
            "molecule_entity_id": torch.zeros_like(chains),
            "token_bond_path_length": _whole_numbers(11, 9, 2, _TOKENS, _TOKENS),
            "bond_mask": bonds,
            "bond_order": bonds * 2,
        },
        "recycle_depth": 2,
    }


ENTRIES = [Entry("RFD4ProteinaTransformer", _build, _inputs)]
