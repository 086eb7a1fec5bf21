"""Where programs look for the degrees."""

from dataclasses import fields
from typing import Any

import omni_sp
from vllm_omni.options import as_degrees

__all__ = ["DiffusionParallelConfig"]

DEGREES = (
    *(field.name for field in fields(omni_sp.DiffusionParallelConfig)),
    *("vae_patch_parallel_size", "vae_parallel_mode", "use_hsdp", "hsdp_shard_size", "hsdp_replicate_size"),
    *("sequence_parallel_size", "ulysses_mode", "allgather_degree", "text_encoder_tp_size", "mask_sp_padding"),
    *("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"),
)
"""The fields that it takes, ours and vLLM-Omni's."""


class DiffusionParallelConfig(omni_sp.DiffusionParallelConfig):
    """Omni-SP's, which understands vLLM-Omni's names of the same things too.

    Args:
        **fields: of `omni_sp.DiffusionParallelConfig`, or vLLM-Omni's. Of these ``vae_patch_parallel_size`` is
            ``vae_parallel``: False for 1, more for True, which takes all ranks. ``use_hsdp`` is ``shard_weights``: each
            rank of ulysses_degree × ring_degree keeps its part of the weights; ``hsdp_shard_size`` and
            ``hsdp_replicate_size`` may say just that.

    Raises:
        ConfigError: both names are given, a field means nothing here, or as `omni_sp.DiffusionParallelConfig` raises
            it.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**as_degrees(fields))
