"""Pipelines whose VAE is left unread: the same latents, and the same results once it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_sp.pipelines.lazy_components import has_unread_weights, lazy_component, lazy_component_names
from tests.pipelines.zoo.all import ENTRIES
from tests.pipelines.zoo.check import draw
from tests.thorough import THOROUGH

FIRST = {entry.name: entry for entry in reversed(ENTRIES.values())}
# What is read too late is late, and right all the same: OMNI_SP_THOROUGH=1 tries every pipeline, else these.
SOME = ("FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline", "DiTPipeline", "LTX2Pipeline")
TRIED = list(FIRST) if THOROUGH else [name for name in SOME if name in FIRST]
# These look at numbers among the weights, or decode, also where they are asked for latents.
NEED_IT_FOR_LATENTS = {"DiTPipeline": {"vae"}, "LTX2Pipeline": {"vae", "audio_vae"}}


@pytest.mark.filterwarnings("ignore")  # of libraries, by the dozen
@pytest.mark.parametrize("name", TRIED)
def test_an_unread_decoder_changes_nothing(name: str, tmp_path: Path) -> None:
    entry = FIRST[name]
    pipe = entry.build()
    pipe.set_progress_bar_config(disable=True)
    names = lazy_component_names(type(pipe), {part: type(module) for part, module in pipe.components.items()})
    if not names:
        pytest.skip("it encodes pictures or sounds, so every rank reads everything")
    decodes = entry.arguments().get("output_type") != "latent"
    latent = {"output_type": "latent"}
    latents, results = draw(pipe, entry.arguments() | latent), draw(pipe, entry.arguments())
    for part in names:
        whole = getattr(pipe, part)
        whole.save_pretrained(tmp_path / part)
        unread = lazy_component(type(whole), str(tmp_path), part, dtype=whole.dtype, device=torch.device("cpu"))
        if getattr(whole, "use_slicing", False):  # set by the entry, and no weight
            unread.enable_slicing()
        setattr(pipe, part, unread)
    assert torch.equal(draw(pipe, entry.arguments() | latent), latents)
    assert {part for part in names if not has_unread_weights(getattr(pipe, part))} == NEED_IT_FOR_LATENTS.get(
        name, set()
    )
    assert torch.equal(draw(pipe, entry.arguments()), results)
    assert [has_unread_weights(getattr(pipe, part)) for part in names] == [not decodes] * len(names)
